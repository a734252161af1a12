"use strict";
// Sortable tables: a click on a heading orders its rows by data-sort (a number or a text); rows without a value stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const isText = [...body.rows].some((row) => value(row) !== "" && Number.isNaN(Number(value(row))));
    const sign = down ? -1 : 1;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isText ? x.localeCompare(y, "en", { numeric: true }) : Number(x) - Number(y));
    });
    body.append(...rows);
  });
}

// Figures take their text and grid colours from the page, in light and dark. The legend stands below the axes; the figure
// grows by the rows its names need at this width, so that it never covers the axis title.
// Plotly gives a legend below the axes half of the figure at most, and scrolls the rest: with MOST rows that is all the room below them.
const PLOT = 300, TITLE = 64, ROW = 21, MOST = 19;
const shade = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function fitted(place, figure) {
  const names = figure.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name);
  const entry = Math.max(...names.map((name) => name.length), 4) * 7.2;
  const across = Math.max(1, Math.floor((place.clientWidth - figure.layout.margin.l - figure.layout.margin.r) / (entry + 40)));
  const below = TITLE + ROW * Math.min(Math.ceil(names.length / across), MOST) + 6;
  const margin = { ...figure.layout.margin, b: below };
  const legend = { orientation: "h", x: 0, xanchor: "left", y: -TITLE / PLOT, yanchor: "top", traceorder: "normal", entrywidth: entry, entrywidthmode: "pixels" };
  place.style.height = `${PLOT + margin.t + below}px`;
  return { ...figure.layout, height: PLOT + margin.t + below, margin, legend };
}
function themed(layout) {
  const axis = { gridcolor: shade("--grid"), linecolor: shade("--rule"), zerolinecolor: shade("--rule"), tickcolor: shade("--rule") };
  return {
    ...layout,
    autosize: true,
    uirevision: "keep",
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: shade("--text") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: shade("--rule"), activecolor: shade("--soft") },
    hoverlabel: { bgcolor: shade("--head"), bordercolor: shade("--rule"), font: { color: shade("--text") } },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}
const figures = [...document.querySelectorAll("script.figure")].map((s) => [document.getElementById(s.dataset.plot), JSON.parse(s.textContent)]);
const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
function draw() {
  for (const [place, figure] of figures) Plotly.react(place, figure.data, themed(fitted(place, figure)), settings);
}
draw();
let waiting;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(draw, 150);
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
