"""What the tests of the live model and of the engine share: moves of layers with the layers that they should
leave, and prompts that begin alike."""

import tiny
import torch

from surgery import recipes as r

N = 6
IDS = tiny.random_prompt(1, 17)  # longer than the sliding window, so that the kinds of layers matter


def instruct(*indices):
    return [("instruct", i) for i in indices]


MOVES = {
    "identity": (lambda x: x, instruct(0, 1, 2, 3, 4, 5)),
    "swap": (lambda x: r.swap(x, 1, 4), instruct(0, 4, 2, 3, 1, 5)),
    "swap_chunks": (lambda x: r.swap_chunks(x, (0, 2), (3, 5)), instruct(3, 4, 2, 0, 1, 5)),
    "rotate": (lambda x: r.swap(r.swap(x, 0, 1), 1, 2), instruct(1, 2, 0, 3, 4, 5)),
    "splice": (
        lambda x: r.splice(x, "base", 1, 3),
        [("instruct", 0), ("base", 1), ("base", 2), *instruct(3, 4, 5)],
    ),
    "splice+swap": (
        lambda x: r.swap(r.splice(x, "base", 0, 2), 0, 5),
        [*instruct(5), ("base", 1), *instruct(2, 3, 4), ("base", 0)],
    ),
    "delete": (lambda x: r.delete(x, 1, 4), instruct(0, 4, 5)),
    "delete one kind": (lambda x: r.keep_every(x, 2), instruct(0, 2, 4)),
    "double": (lambda x: r.double(x, 2, 4), instruct(0, 1, 2, 2, 3, 3, 4, 5)),
    "repeat": (lambda x: r.repeat(x, 1, 3, 3), instruct(0, 1, 2, 1, 2, 1, 2, 3, 4, 5)),
    "reverse": (lambda x: r.reverse(x, 0, 5), instruct(4, 3, 2, 1, 0, 5)),
    "same depth, one layer twice": (lambda x: r.delete(r.double(x, 2, 3), 5, 6), instruct(0, 1, 2, 2, 3, 5)),
    "more different layers than banks": (
        lambda x: r.Recipe(x.slots + r.identity(N, "base").slots, "instruct", "instruct", "instruct"),
        instruct(*range(6)) + [("base", i) for i in range(6)],
    ),
}

SHORT = [tiny.random_prompt(20 + k, n) for k, n in enumerate([3, 12, 7, 1, 23, 7])]
STARTS = [tiny.random_prompt(90, 30), tiny.random_prompt(91, 45)]
BRANCHES = (
    [STARTS[k % 2] + tiny.random_prompt(60 + k, 1 + 3 * k) for k in range(9)]
    + [STARTS[1] + SHORT[0][:1]]
    + SHORT
)


def assert_is_checkpoint(live, pair, source="instruct"):
    """Every weight that runs equals the file's, read by safetensors itself."""
    assert len(live.layers) == pair.n
    for p, bank in enumerate(live.layers):
        clean = pair.layer(source, p)
        assert set(clean) == set(bank.tensors)
        for name, tensor in bank.tensors.items():
            assert torch.equal(tensor, clean[name]), (p, name)
    own = dict(live.model.named_parameters())
    for name, tensor in pair.states[source].items():
        # through the module tree as well: what transformers would run
        assert torch.equal(own[name], tensor), name
    for p in range(pair.n):
        assert live.model.get_submodule(live.stack_name)[p] is live.layers[p].module
