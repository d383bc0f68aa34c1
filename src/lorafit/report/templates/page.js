"use strict";
(() => {
  const nearest = (points, share) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < share) low = middle; else high = middle;
    }
    return share - points[low][0] < points[high][0] - share ? points[low] : points[high];
  };
  const hide = (plot) => {
    for (const part of plot.querySelectorAll(".cursor, .tip")) part.style.display = "none";
  };
  const show = (plot, x) => {
    const lines = JSON.parse(plot.dataset.lines);
    const cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (x - box.left) / box.width));
    const found = lines.map((line) => [line.name, nearest(line.points, share)]);
    const [at, step] = found[0][1];
    const many = found.length > 1;
    tip.textContent = ["step " + step, ...found.map(([name, point]) =>
      many ? name + " " + point[2] + (point[1] === step ? "" : " (step " + point[1] + ")") : point[2])].join("\n");
    cursor.style.left = 100 * at + "%";
    cursor.style.display = tip.style.display = "block";
    if (at > 0.5) { tip.style.left = "auto"; tip.style.right = 100 - 100 * at + 1.5 + "%"; }
    else { tip.style.right = "auto"; tip.style.left = 100 * at + 1.5 + "%"; }
  };
  let shown = null;
  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest?.(".plot[data-lines]") ?? null;
    if (shown && shown !== plot) hide(shown);
    if (plot) show(plot, event.clientX);
    shown = plot;
  });
  for (const kind of ["pointercancel", "pointerleave"]) {
    document.documentElement.addEventListener(kind, () => { if (shown) hide(shown); });
  }
})();
