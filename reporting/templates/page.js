"use strict";
// Column heads become buttons that sort their table. Without this script the tables are complete, in the run's order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      const numeric = rows.every(([text]) => text === "" || Number.isFinite(Number(text)));
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return way * (numeric ? a - b : a.localeCompare(b, "en"));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// A link to an experiment opens it, and the group that it is folded into.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  for (let box = target; box; box = box.parentElement) if (box instanceof HTMLDetailsElement) box.open = true;
  target?.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();
