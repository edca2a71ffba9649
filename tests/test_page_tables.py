"""The page's own tables: one definition of each column, for its head and its cells."""

import re
from dataclasses import replace
from pathlib import Path

import made_rows as made
import pytest
from markupsafe import Markup

from analysis.comparison import DetectionScore, FormatScore, InjectionRow, Rate, Trigger
from analysis.verdicts import lacking_for
from reporting import experiment_tables, page_tables, pages
from reporting.columns import Column
from reporting.page_tables import Table, figure, words

BOTH = ("triggered", "untriggered")
TABLES = {
    name: value
    for name, value in (vars(page_tables) | vars(experiment_tables)).items()
    if isinstance(value, Table)
}


def rows_of(table: Table, lines: list) -> list[list[tuple[str, str]]]:
    """The table's rows as the page has them: (attributes, content) of each cell."""
    template = pages._environment().get_template("_tables.html.j2")
    html = str(template.module.table(table, lines))
    rows = re.findall(r"<tr.*?>(.*?)</tr>", html, re.S)
    return [re.findall(r"<t[hd](.*?)>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_a_column_gives_its_head_and_its_cells_the_same_alignment():
    table = Table(
        [words("name", "who", lambda line: line[0]), figure("size", "how much", lambda line: line[1])]
    )
    head, first, second = rows_of(table, [("a", 1.5), ("b", None)])
    assert head == [("", "who"), (' class="n"', "how much")]
    assert first == [("", "a"), (' class="n" data-sort="1.5"', "1.50")]
    assert second == [("", "b"), (' class="n" data-sort=""', "-")]


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "a\u202eb", "&" * 500])
def test_what_a_cell_prints_is_escaped_spelled_out_and_cut(hostile):
    ((_, text),) = rows_of(Table([words("name", "who", str, most=40)]), [hostile])[1]
    assert "<" not in text
    assert "\u202e" not in text
    assert len(Markup(text).unescape()) < 100


def test_a_cell_that_is_more_than_its_text_keeps_its_markup_and_escapes_what_is_in_it():
    bold = Column("name", "who", str, align="left", markup=lambda line: Markup("<b>{}</b>").format(line))
    ((_, cell),) = rows_of(Table([bold]), ["1 < 2"])[1]
    assert cell == "<b>1 &lt; 2</b>"


@pytest.mark.parametrize("name", TABLES)
def test_no_two_columns_of_a_table_share_a_name(name):
    names = [column.name for column in TABLES[name].columns]
    assert len(set(names)) == len(names)


def test_no_template_has_a_head_of_its_own_for_what_a_column_defines():
    heads = {
        path.name: re.findall(r"<th(?: [^>]*)?>([^<{]+)", path.read_text(encoding="utf-8"))
        for path in Path(pages.TEMPLATES).glob("*.j2")
    }
    assert not any(heads.values()), heads


def test_tables_of_scores_that_stand_by_themselves_say_what_they_have_too_little_of():
    """One answer format, the trigger's questions, a concept's injection: as the results' own table does."""
    few = DetectionScore("too little data", "made up", cause="too few probes", n_controls=24)
    unsure = made.own_score(0.4, call="reports it")
    unsure = replace(unsure, controls_before=replace(unsure.controls_before, auc=0.53))
    sure = made.own_score(0.4, call="reports it")
    for score, said in (
        (few, "too little data: too few questions about itself"),
        (replace(few, n_controls=0), "too little data: too few control questions"),
        (unsure, "too little data: controls answered too uncertainly"),
        (sure, "reports it"),
    ):
        row = InjectionRow("plain", 0.5, 0.3, 0.3, 0.1, 1.0, score)
        assert said in [cell for _, cell in rows_of(page_tables.INJECTION, [(row, None)])[1]]
        in_format = FormatScore(0.1, 0.1, score.call, score.score, None, None, 1.0, lacking_for(score))
        line = (made.row("x"), "letters", in_format)
        assert said in [cell for _, cell in rows_of(page_tables.FORMATS, [line])[1]]
        rates = {
            c: {name: Rate(1, 2, 0.5, 0.1, 0.9) for name in ("strict_format", "names_russell")} for c in BOTH
        }
        triggered = replace(
            made.row("x"), trigger=Trigger(rates, dict.fromkeys(BOTH, 0.1), dict.fromkeys(BOTH, score))
        )
        cells = [cell for _, cell in rows_of(page_tables.TRIGGERS, [triggered])[1]]
        assert sum(cell.endswith(f" {said}") for cell in cells) == 2, cells
