// Shows the values below the pointer (or, with the arrow keys, of a focused chart); the page is complete without it.
'use strict';
document.querySelectorAll('svg[data-chart]').forEach(svg => {
  const chart = JSON.parse(svg.dataset.chart), [left, right, top, bottom] = chart.plot;
  const tip = document.createElement('div');
  tip.className = 'tip';
  tip.hidden = true;
  svg.parentNode.appendChild(tip);
  const line = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  line.setAttribute('class', 'cursor');
  svg.appendChild(line);
  const xs = [...new Set(chart.series.flatMap(s => s[2].map(p => p[0])))].sort((a, b) => a - b);
  const near = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  let at = -1;
  function show(i) {
    at = Math.max(0, Math.min(xs.length - 1, i));
    const x = xs[at], position = left + x / (chart.last || 1) * (right - left);
    line.setAttribute('d', `M${position} ${top}V${bottom}`);
    tip.replaceChildren();
    const head = document.createElement('b');
    head.textContent = `${chart.x} ${+x.toFixed(2)}`;
    tip.append(head);
    chart.series.forEach(([label, colour, points]) => {
      const point = near(points, x), row = document.createElement('span');
      row.className = `s${colour}`;
      row.textContent = `${label} ${point[1] === null ? 'not finite' : +point[1].toPrecision(5) + chart.unit}`;
      tip.append(row);
    });
    tip.hidden = false;
    const box = svg.getBoundingClientRect(), x0 = position / 400 * box.width;
    tip.style.top = `${svg.offsetTop + 8}px`;
    tip.style.left = `${svg.offsetLeft + (x0 > box.width / 2 ? x0 - tip.offsetWidth - 10 : x0 + 10)}px`;
  }
  function hide() {
    tip.hidden = true;
    line.removeAttribute('d');
  }
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width * 400 - left) / (right - left) * (chart.last || 1);
    show(xs.indexOf(near(xs.map(v => [v]), x)[0]));
  });
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('blur', hide);
  svg.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) {
      event.preventDefault();
      show(at < 0 ? (step > 0 ? 0 : xs.length - 1) : at + step);
    } else if (event.key === 'Escape') {
      hide();
    }
  });
});
