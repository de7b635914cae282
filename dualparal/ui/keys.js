// What starts work starts it once: neither the second half of a double click nor a key that is held down starts it again.
const STARTS = '#generate, #another, .example, [data-do=resume], [data-do=compare], [data-do=again]';
document.addEventListener('click', (event) => {
  if (event.detail < 2 || !event.target.closest(STARTS)) return;
  event.stopImmediatePropagation();
  event.preventDefault();
}, true);
// Ctrl+Enter in the prompt, or anywhere on the page, is Generate.
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter') return;
  const asks = event.ctrlKey || event.metaKey;
  if (event.repeat && (asks || event.target.closest(STARTS))) { event.preventDefault(); event.stopImmediatePropagation(); return; }
  if (!asks || event.target.closest('#steer-text')) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  document.querySelector('#generate')?.click();
}, true);
// Names for what Gradio leaves without one, and the key that Generate goes by where there is a keyboard.
const NAMES = {'#takes input': 'How many takes', '#search :is(input, textarea)': 'Search your videos', '#filter input': 'Which videos are shown', '#dice': 'Draw a seed', '#restore input': 'A video made here, to restore its settings', '#start-image input': 'A picture to begin with',
  '#steer-text :is(input, textarea)': 'Another prompt, from here on', '#steer-how input': 'How the new shot begins'};
const nameThem = () => {
  for (const [selector, name] of Object.entries(NAMES))
    for (const found of document.querySelectorAll(selector)) if (found.getAttribute('aria-label') !== name) found.setAttribute('aria-label', name);
  document.documentElement.classList.toggle('mac', /Mac|iPhone|iPad/.test(navigator.platform));
};
setInterval(nameThem, 1000);
