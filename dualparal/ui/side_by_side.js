// The videos under one playhead: the longest leads, the others follow it and rest on their last picture where they are shorter.
// Where one of them has to load, all wait.
(() => {
  const EVERY_MS = 40, DRIFT_S = 0.08, NEAR_S = 0.1;
  let isPlaying = false;
  const find = (selector) => element.querySelector(selector);
  const videos = () => [...element.querySelectorAll('video')].filter((video) => !video.error);
  const longest = (all) => all.reduce((found, one) => (one.duration > found.duration ? one : found));
  const lastOf = (video) => Math.max(0, video.duration - 0.02);
  const seek = (to) => { for (const video of videos()) video.currentTime = Math.min(to, lastOf(video)); };

  const follow = (video, now) => {
    const isOver = now >= video.duration - 0.02, to = Math.min(now, lastOf(video));
    const isOff = Math.abs(video.currentTime - to) > (isPlaying && !isOver ? DRIFT_S : 0.02);
    if (isOff && !video.seeking) video.currentTime = to;
    if (isPlaying && !isOver) { if (video.paused) video.play().catch(() => {}); } else if (!video.paused) video.pause();
  };

  const tick = () => {
    if (!element.isConnected) { clearInterval(timer); return; }
    const all = videos();
    if (!all.length || all.some((video) => !(video.duration > 0))) return;
    const lead = longest(all), place = find('.place');
    if (isPlaying && (lead.ended || lead.currentTime >= lead.duration - 0.01)) {
      if (find('.loop').checked) seek(0); else isPlaying = false;
    }
    const now = lead.currentTime, others = all.filter((video) => video !== lead);
    others.forEach((video) => follow(video, now));
    const isAwaited = others.some((video) => now < video.duration - NEAR_S && video.readyState < 3);
    if (isPlaying && !isAwaited) { if (lead.paused) lead.play().catch(() => {}); } else if (!lead.paused) lead.pause();
    if (place.max !== String(lead.duration)) place.max = String(lead.duration);
    place.value = String(now);
    const text = `${now.toFixed(1)} of ${lead.duration.toFixed(1)} s`, verb = isPlaying ? 'Pause' : 'Play';
    if (find('output').textContent !== text) { find('output').textContent = text; place.setAttribute('aria-valuetext', text); }
    if (find('.play').textContent !== verb) find('.play').textContent = verb;
  };

  const wipeTo = (percent) => {
    const slider = find('.wipe-at input');
    if (slider) { slider.value = String(percent); find('section').style.setProperty('--wipe', String(slider.value / 100)); }
  };
  element.addEventListener('click', (event) => {
    if (event.target.closest('.close')) { isPlaying = false; trigger('close', {}); }
    if (!event.target.closest('.play')) return;
    const all = videos();
    if (!isPlaying && all.length && longest(all).ended) seek(0);
    isPlaying = !isPlaying;
    tick();
  });
  element.addEventListener('input', (event) => {
    if (event.target.matches('.place')) seek(Number(event.target.value));
    if (event.target.matches('.wipe-at input')) wipeTo(event.target.value);
    if (event.target.matches('.wipe')) { find('section').classList.toggle('wipes', event.target.checked); wipeTo(50); }
  });
  // Over the pictures the wipe goes where the pointer is pressed.
  const drag = (event) => {
    const frame = event.buttons === 1 && event.target.closest?.('.wipes .frame');
    if (!frame) return;
    const {left, width} = frame.getBoundingClientRect();
    wipeTo(100 * Math.max(0, Math.min(1, (event.clientX - left) / width)));
    event.preventDefault();
  };
  element.addEventListener('pointerdown', drag);
  element.addEventListener('pointermove', drag);
  element.addEventListener('error', (event) => {
    if (event.target.tagName === 'VIDEO') event.target.closest('.frame').dataset.gone = 'This video is not there any more';
  }, true);

  const timer = setInterval(tick, EVERY_MS);
  watch('value', () => {
    const section = find('section');
    if (!section) return;
    isPlaying = !window.matchMedia('(prefers-reduced-motion: reduce)').matches;
    section.scrollIntoView({behavior: isPlaying ? 'smooth' : 'auto', block: 'center'});
    find('.play').focus({preventScroll: true});
  });
})();
