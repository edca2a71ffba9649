const read = (table, column) => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim());
const main = document.querySelector("table.main"), heads = [...main.tHead.rows[0].cells], column = heads.findIndex((h) => h.textContent.startsWith("perplexity"));
const found = { inner: innerWidth, scroll: document.documentElement.scrollWidth, pwned: window.pwned ?? null, scripts: document.scripts.length };
found.loaded = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 20)).filter((name) => !name.startsWith("data:"));
found.buttons = document.querySelectorAll("table.sortable th button").length; found.heads = document.querySelectorAll("table.sortable th").length;
found.images = [...document.images].map((image) => image.naturalWidth); found.before = read(main, column); found.sorted = [];
const button = heads[column].querySelector("button"); button.focus(); found.focused = document.activeElement === button;
for (let k = 0; k < 2; k++) { button.click(); found.sorted.push([heads[column].getAttribute("aria-sort"), read(main, column)]); }
heads[0].querySelector("button").click();
found.names = read(main, 0); found.states = heads.map((h) => h.getAttribute("aria-sort"));
found.first = document.querySelector(".first img").currentSrc === document.querySelector(".first source").srcset;
found.figure = document.querySelector(".first figure").getBoundingClientRect().top;
document.querySelectorAll("details").forEach((d) => { d.open = true; });
found.open = document.documentElement.scrollWidth;
document.querySelectorAll("details").forEach((d) => { d.open = false; });
location.hash = "#experiment-placebo_mlp_1";
found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
found.paper = getComputedStyle(document.body).backgroundColor;
found.regions = [...document.querySelectorAll(".scroll")].every((region) => region.tabIndex === 0);
const phone = document.querySelector("table.main td");
found.sticky = getComputedStyle(phone).position;
setTimeout(async () => {
  if (globalThis.axe) {
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    const { violations } = await axe.run(document, { resultTypes: ["violations"] });
    found.axe = violations.map((v) => [v.id, v.impact, v.nodes.length, v.nodes[0].html.slice(0, 160)]);
  }
  const target = document.getElementById("experiment-placebo_mlp_1"); found.opened = target.open && target.parentElement.closest("details").open;
  parent.postMessage(JSON.stringify(found), "*");
}, 200);
