// Draws the charts, and lets tables be searched, sorted and exported. Everything it needs is in this file.
"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const options = { actions: { export: true, source: false, compiled: false, editor: false }, renderer: "svg" };
for (const [name, spec] of Object.entries(specs)) vegaEmbed(`#chart-${name}`, spec, options);

const compare = new Intl.Collator("en", { numeric: true }).compare;

// As views/rows.py: a text that a spreadsheet would take as a formula gets a quote; numbers stay as they are.
function csv(table) {
  const safe = (cell) => (!cell.classList.contains("number") && /^[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/.test(cell.textContent) ? "'" : "") + cell.textContent;
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return [...table.rows].map((row) => [...row.cells].map((cell) => quoted(safe(cell))).join(",")).join("\n") + "\n";
}

for (const sheet of document.querySelectorAll("details.sheet")) {
  const table = sheet.querySelector("table");
  if (table === null) continue;
  const [search, found, button] = ["input", ".found", "button"].map((each) => sheet.querySelector(each));
  const rows = [...table.tBodies[0].rows];
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    found.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv" }));
    link.download = `${sheet.id}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  [...table.tHead.rows[0].cells].forEach((head, at) => {
    let direction = head.classList.contains("number") ? -1 : 1;
    head.addEventListener("click", () => {
      const isNumber = head.classList.contains("number");
      const order = (a, b) => {
        const [left, right] = [a, b].map((row) => row.cells[at].textContent);
        return direction * (isNumber ? Number(left) - Number(right) : compare(left, right));
      };
      table.tBodies[0].append(...rows.sort(order));
      direction = -direction;
    });
  });
}
