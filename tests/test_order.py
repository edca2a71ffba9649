"""An experiment's numbers do not depend on what was measured before it: to the bit, whatever the order."""

import copy
import random

import pytest
import small_battery

import run_all
from runner.batch import run_experiment
from runner.choosing import chosen_suites, make_plans, make_protocol
from runner.replica import ModelOptions, Replica

NAMES = (
    "baseline_instruct",
    "swap_distant_10_55",
    "franken_instruct_first_32",
    "perturb_all_5pct",
    "blend_linear",
    "double_24_40",
    "double_24_40_half",
    "parallel_16_48",
    "shuffle_all",
    "placebo_both_1",
    "concept_injection_short",
)


@pytest.fixture(scope="module")
def measure(pair, tmp_path_factory):
    """measure(names) -> their results in the order of `names`, by one freshly loaded pair, without times."""
    out = tmp_path_factory.mktemp("order")

    def run(names):
        args = run_all.parse_arguments(small_battery.arguments(pair, out, "--experiments", *NAMES))
        replica = Replica(ModelOptions.of(args))
        suites = chosen_suites(args)
        plans, _ = make_plans(args, replica.shape.layers, set(replica.shape.sources), suites)
        protocol = make_protocol(args, plans, suites)
        loaded = replica.ready(protocol, None)
        by_name = {plan.experiment.name: plan for plan in plans}
        done = {}
        for name in names:
            result = run_experiment(replica.engine, by_name[name], protocol, loaded.fingerprint)
            assert result["error"] is None and result["weights"]["exact"], (name, result["error"])
            done[name] = {k: copy.deepcopy(v) for k, v in result.items() if k != "performance"}
        return done

    with pytest.MonkeyPatch.context() as patch:
        small_battery.use(patch)
        yield run


@pytest.fixture(scope="module")
def forward(measure):
    return measure(NAMES)


ORDERS = {
    "backward": NAMES[::-1],
    "mixed, some twice": random.Random(0).sample((*NAMES, *NAMES[1:6]), len(NAMES) + 5),
    "one alone": ("double_24_40_half",),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_of_experiments_gives_the_same_numbers(measure, forward, order):
    assert {name: forward[name] for name in order} == measure(order)
