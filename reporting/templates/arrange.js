// Filters and sorts the pictures; without it the page shows all of them in the order of the list.
'use strict';
const list = document.querySelector('.predictions'), form = document.querySelector('form');
const cards = [...list.children];
const signs = {listed: 0, most: -1, least: 1};
function arrange() {
  const sign = signs[form.order.value], kind = form.kind ? form.kind.value : 'all';
  const ordered = [...cards].sort((a, b) => sign * (a.dataset.p - b.dataset.p));
  list.replaceChildren(...ordered.filter(card => kind === 'all' || kind === card.dataset.kind));
}
form.hidden = false;
form.addEventListener('input', arrange);
arrange();
