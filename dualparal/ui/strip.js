// Runs once for the board: draws the playhead over the strip of blocks, seeks when a block is clicked or come to by keyboard, keeps
// the tab's title and its job, and the place in the video when the live stream is replaced by the finished file.
let job = '', at = 0, length = 0, atEnd = false, source = '';
const player = () => document.querySelector('#video video');
const board = () => element.querySelector('.board');

element.addEventListener('click', (event) => {
  const block = event.target.closest('.block.ready');
  const video = player();
  if (block && video) { video.currentTime = Number(block.dataset.from) + 0.001; video.play().catch(() => {}); }
});

// The strip by keyboard: arrows go from block to block, Home and End to the first and last that can be seen.
const STEPS = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity};
let isFocused = false;
element.addEventListener('focusin', (event) => { isFocused = event.target.classList.contains('strip'); });
document.addEventListener('focusin', (event) => { if (!element.contains(event.target)) isFocused = false; });
document.addEventListener('pointerdown', (event) => { if (!element.contains(event.target)) isFocused = false; }, true);
const tell = (strip) => {
  const now = Number(strip.getAttribute('aria-valuenow')), all = [...strip.querySelectorAll('.block')];
  const here = all.filter((block) => Number(block.dataset.from) <= now + 0.01).pop();
  strip.setAttribute('aria-valuetext', `${now.toFixed(1)} s, ${here?.title ?? ''}`);
};
element.addEventListener('keydown', (event) => {
  const strip = event.target.closest('.strip');
  if (!strip || !(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const seen = [...strip.querySelectorAll('.block:is(.ready, [data-look])')];
  if (!seen.length) return;
  const now = Number(strip.getAttribute('aria-valuenow'));
  const here = seen.findLastIndex((block) => Number(block.dataset.from) <= now + 0.05);
  const block = seen[Math.max(0, Math.min(seen.length - 1, here + STEPS[event.key]))];
  strip.setAttribute('aria-valuenow', block.dataset.from);
  block.click();
  tell(strip);
});

const TITLE = 'DualParal Studio';
let watched = '';  // a job that this tab has seen at work
const entitle = (now) => {
  const {state, job: id} = now.dataset, {told} = now.querySelector('.progress').dataset;
  if (state === 'running' || state === 'queued') watched = id;
  const mark = state === 'running' ? `${told} · ` : watched !== id ? '' : {queued: '… ', finished: '✓ ', failed: '✗ '}[state] ?? '';
  if (state !== 'away' && document.title !== mark + TITLE) document.title = mark + TITLE;
};

const resume = (video, time) => {
  const go = () => { video.currentTime = time; video.play().catch(() => {}); };
  if (video.readyState >= 1) go(); else video.addEventListener('loadedmetadata', go, {once: true});
};

const look = () => {
  if (!element.isConnected) { clearInterval(timer); return; }
  const now = board(), video = player();
  if (!now) { if (document.title.length > TITLE.length && watched) { watched = ''; document.title = TITLE; } return; }
  entitle(now);
  if (now.dataset.job !== job) {
    job = now.dataset.job; at = 0; source = ''; atEnd = false;
    sessionStorage.setItem('dualparal-job', job);
    if (window.matchMedia('(max-width: 760px)').matches)
      document.querySelector('#stage')?.scrollIntoView({behavior: 'smooth', block: 'start'});
  }
  const strip = now.querySelector('.strip');
  if (!strip) return;
  const total = Number(strip.dataset.seconds) || 1;
  if (isFocused && document.activeElement === document.body) { strip.focus({preventScroll: true}); isFocused = true; }
  const place = rough.at ?? video?.currentTime ?? 0;
  if (Math.abs(Number(strip.getAttribute('aria-valuenow')) - place) > 0.05) { strip.setAttribute('aria-valuenow', place.toFixed(2)); if (document.activeElement === strip) tell(strip); }
  if (!video || !(video.currentSrc || video.src)) { element.style.setProperty('--playhead', String(rough.at === null ? -10 : rough.at / total)); return; }
  if (rough.at !== null) { at = rough.at; atEnd = false; source = video.currentSrc || video.src; element.style.setProperty('--playhead', String(at / total)); return; }
  const src = video.currentSrc || video.src;
  if (source && src !== source && !src.startsWith('blob:') && at > 0 && !atEnd) resume(video, at);
  else { at = video.currentTime; atEnd = video.ended || (video.duration > 0 && at >= video.duration - 0.15); }
  source = src;
  element.style.setProperty('--playhead', String(Math.min(1, at / total)));
};
const timer = setInterval(look, 200);
watch('value', look);  // at once, so that a reload right after a new job finds it
