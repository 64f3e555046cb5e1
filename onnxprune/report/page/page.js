// Tables sort by the head that is clicked and show the rows that hold what is typed.
"use strict";
for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody"), rows = [...body.rows];
  const heads = [...box.querySelectorAll("th")];
  const value = (row, column) => {
    const cell = row.cells[column], data = cell.querySelector("data");
    if (data) return Number(data.value);
    const text = cell.textContent.trim();
    return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text.toLowerCase();
  };
  const compare = (a, b) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  };
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.ariaSort ? head.ariaSort === "ascending" : !head.classList.contains("t") && column > 0;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.ariaSort = down ? "descending" : "ascending";
    const keys = new Map(rows.map((row, index) => [row, [value(row, column), index]]));
    const sorted = [...rows].sort((a, b) => {
      const [x, i] = keys.get(a), [y, j] = keys.get(b), order = compare(x, y);
      return (down ? -order : order) || i - j;
    });
    body.append(...sorted);
  }));
  const field = box.querySelector("input"), count = box.querySelector("output");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  field?.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => texts.get(row).includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  });
}
