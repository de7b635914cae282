// Runs once for the board: draws the playhead over the strip of blocks, seeks when a finished block is clicked, remembers the
// tab's job, and keeps the place in the video when the live stream is replaced by the finished file.
let job = '', at = 0, length = 0, atEnd = false, source = '';
const player = () => document.querySelector('#video video');
const board = () => element.querySelector('.board');

element.addEventListener('click', (event) => {
  const block = event.target.closest('.block.ready');
  const video = player();
  if (block && video) { video.currentTime = Number(block.dataset.from) + 0.001; video.play().catch(() => {}); }
});

const resume = (video, time) => {
  const go = () => { video.currentTime = time; video.play().catch(() => {}); };
  if (video.readyState >= 1) go(); else video.addEventListener('loadedmetadata', go, {once: true});
};

const look = () => {
  if (!element.isConnected) { clearInterval(timer); return; }
  const now = board(), video = player();
  if (!now) return;
  if (now.dataset.job !== job) {
    job = now.dataset.job; at = 0; source = ''; atEnd = false;
    sessionStorage.setItem('dualparal-job', job);
    if (window.matchMedia('(max-width: 760px)').matches)
      document.querySelector('#stage')?.scrollIntoView({behavior: 'smooth', block: 'start'});
  }
  const strip = now.querySelector('.strip');
  if (!strip) return;
  const total = Number(strip.dataset.seconds) || 1;
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
