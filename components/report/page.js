// Click on a column's title to sort by it, once more to turn the order round; everything is open on paper.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  titles.forEach((title, column) => {
    const sort = () => {
      const up = title.getAttribute("aria-sort") === "descending";
      const key = (row) => row.cells[column].textContent.trim();
      const order = [...body.rows].sort((one, other) => {
        const [a, b] = [parseFloat(key(one)), parseFloat(key(other))];
        const difference = isNaN(a) || isNaN(b) ? key(one).localeCompare(key(other)) : a - b;
        return up ? difference : -difference;
      });
      body.append(...order);
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", up ? "ascending" : "descending");
    };
    title.classList.add("sorts");
    title.tabIndex = 0;
    title.addEventListener("click", sort);
    title.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
