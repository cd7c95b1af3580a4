// Draws the figures of the page with Plotly, in the page's own colours, and folds away the tables that show the same.
"use strict";
(() => {
  document.documentElement.dataset.scripted = "";  // shows the charts' places, whose width Plotly asks for
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // "@first" and the like become the page's colours.
  const painted = (value) => {
    if (typeof value === "string" && value.startsWith("@")) {
      return value === "@scale" ? [[0, colour("--panel")], [1, colour("--first")]] : colour("--" + value.slice(1));
    }
    if (Array.isArray(value)) return value.map(painted);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
    }
    return value;
  };

  const axis = (own) => ({
    gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"), zeroline: false,
    automargin: true, ...own,
  });

  const draw = () => {
    figures.forEach((figure, number) => {
      const layout = painted(figure.layout);
      const place = document.getElementById(`chart-${number}`);
      Plotly.react(place, painted(figure.data), {
        ...layout, width: place.clientWidth,
        xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--quiet") },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 50, r: 14, t: 10, b: 40, ...layout.margin },
        legend: { orientation: "h", y: 1.12, x: 1, xanchor: "right", ...layout.legend },
        hoverlabel: { bgcolor: colour("--panel"), font: { color: colour("--text") }, bordercolor: colour("--line") },
        hovermode: layout.hovermode ?? (layout.yaxis.type === "category" ? "closest" : "x unified"),
        transition: still ? undefined : layout.transition,
      }, { displaylogo: false, displayModeBar: false });
    });
  };

  draw();
  for (const table of document.querySelectorAll("details.closed")) table.open = false;
  let soon;
  addEventListener("resize", () => { clearTimeout(soon); soon = setTimeout(draw, 150); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Paper is white, whatever the screen is; and what is folded away is wanted on it.
  const paper = (on) => {
    document.documentElement.classList.toggle("paper", on);
    for (const fold of document.querySelectorAll("details.pre, details.closed")) fold.open = on;
    draw();
  };
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  document.documentElement.dataset.drawn = String(figures.length);
})();
