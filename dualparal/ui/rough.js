// Runs once for the board: plays the rough film on the stage where there is no video yet, and paints each block's look into its
// cell of the strip. The film loops over all there is: finished blocks as video, the others as they look so far.
const rough = (() => {
  const COLUMNS = 8;  // pictures in a row of a sheet, as `media/rough.py` packs them
  const sheets = new Map();  // block → {url, image, pictures, step}: the newest that has arrived
  const asked = new Map();  // block → the url that is on its way
  const layer = document.createElement('div');
  layer.className = 'rough';
  layer.innerHTML = '<canvas></canvas><button type="button"></button>';
  const canvas = layer.firstChild, words = layer.lastChild;
  const next = document.createElement('p');  // over the video, while it plays again what there is
  next.className = 'next'; next.hidden = true;
  let at = 0, lastMs = 0, isPaused = window.matchMedia('(prefers-reduced-motion: reduce)').matches, isHeld = false;
  let shown = '';  // what the canvas shows: block, picture and sheet
  let known = '';  // the job
  const heard = new WeakSet();

  const stage = () => document.querySelector('#video');
  const isOn = () => layer.isConnected && !layer.hidden;

  const cells = (strip) => {
    const found = [...strip.querySelectorAll('.block')].map((cell) => ({
      cell, from: Number(cell.dataset.from), isReady: cell.classList.contains('ready'), url: cell.dataset.look,
      step: Number(cell.dataset.step), pictures: Number(cell.dataset.pictures), block: Number(cell.dataset.block),
    }));
    found.forEach((one, place) => { one.to = found[place + 1]?.from ?? Number(strip.dataset.seconds); });
    return found;
  };

  const fetchLook = (one) => {
    if (!one.url || asked.get(one.block) === one.url) return;
    asked.set(one.block, one.url);
    const image = new Image(), job = known;
    image.onload = () => {
      if (job !== known || asked.get(one.block) !== one.url) return;
      sheets.set(one.block, {url: one.url, image, pictures: one.pictures, step: one.step});
      const strip = element.querySelector('.strip');
      if (strip) paintCells(cells(strip));
    };
    image.src = one.url;
  };

  // One picture of a sheet, over the whole of a canvas of the given size.
  const draw = (context, sheet, picture, width, height, isCovering) => {
    const columns = Math.min(COLUMNS, sheet.pictures), rows = Math.ceil(sheet.pictures / columns);
    let w = sheet.image.naturalWidth / columns, h = sheet.image.naturalHeight / rows;
    let x = (picture % columns) * w, y = Math.floor(picture / columns) * h;
    if (isCovering) {
      const scale = Math.max(width / w, height / h);
      x += (w - width / scale) / 2; y += (h - height / scale) / 2; w = width / scale; h = height / scale;
    }
    context.imageSmoothingQuality = 'high';
    context.drawImage(sheet.image, x, y, w, h, 0, 0, width, height);
  };

  const paintCells = (all) => {
    for (const one of all) {
      const sheet = sheets.get(one.block);
      if (!sheet) continue;
      let small = one.cell.firstChild;
      if (!small) { small = document.createElement('canvas'); one.cell.append(small); one.cell.classList.add('looked'); }
      const width = Math.max(1, one.cell.clientWidth), height = Math.max(1, one.cell.clientHeight);
      small.width = width; small.height = height;
      draw(small.getContext('2d'), sheet, Math.floor(sheet.pictures / 2), width, height, true);
    }
  };

  const paintStage = (all) => {
    const one = all.find(({from, to}) => from <= at && at < to), sheet = one && sheets.get(one.block);
    if (!sheet) return;
    const share = (at - one.from) / (one.to - one.from);
    const picture = Math.min(sheet.pictures - 1, Math.floor(share * sheet.pictures));
    const name = `${sheet.url} ${picture}`;
    if (name === shown) return;
    shown = name;
    const columns = Math.min(COLUMNS, sheet.pictures), rows = Math.ceil(sheet.pictures / columns);
    const w = sheet.image.naturalWidth / columns, h = sheet.image.naturalHeight / rows;
    const scale = Math.max(1, Math.round(640 / w));  // smoothed here: browsers smooth pictures this small badly
    if (canvas.width !== w * scale || canvas.height !== h * scale) { canvas.width = w * scale; canvas.height = h * scale; }
    draw(canvas.getContext('2d'), sheet, picture, canvas.width, canvas.height, false);
    layer.dataset.block = one.block;
  };

  const say = (all, steps, waits) => {
    const one = all.find(({from, to}) => from <= at && at < to), sheet = one && sheets.get(one.block);
    const step = !sheet || !sheet.step ? '' : sheet.step < steps ? `, step ${sheet.step} of ${steps}` : ', this block is done';
    const text = sheets.size ? `rough${step}${isPaused ? ' · paused' : ''}` : waits;
    if (words.textContent !== text) words.textContent = text;
    words.disabled = !sheets.size;
    words.ariaLabel = sheets.size ? `${isPaused ? 'Play' : 'Pause'} the rough film: ${text}` : text;
    layer.classList.toggle('waiting', !sheets.size);
  };

  const show = () => {
    const over = stage();
    if (!over) return;
    if (layer.parentNode !== over) over.append(layer);
    layer.hidden = false;
  };
  const hide = () => { layer.hidden = true; };

  // A growing video that has come to its end waits for its next block, and says so.
  const sayNext = (state, all) => {
    const awaited = all.findIndex((one) => !one.isReady), over = stage();
    const isAwaited = state === 'running' && hasLooped && awaited > 0 && !isOn();
    next.hidden = !isAwaited;
    if (!isAwaited || !over) return;
    if (next.parentNode !== over) over.append(next);
    const of = 'endless' in all[0].cell.parentNode.dataset ? '' : ` of ${all.length}`;
    const text = `plays what is there; block ${awaited + 1}${of} is next`;
    if (next.textContent !== text) next.textContent = text;
  };
  let hasLooped = false, numReady = 0;

  const playFrom = (video, time) => { hide(); video.currentTime = time + 0.001; video.play().catch(() => {}); };

  // Where the film goes on: in the video, or in what is still rough.
  const move = (state, all, video) => {
    const passed = lastMs && !isPaused ? Math.min(1, (performance.now() - lastMs) / 1000) : 0;
    lastMs = performance.now();
    const ready = all.findIndex((one) => !one.isReady), readyTo = ready < 0 ? all.at(-1).to : ready ? all[ready - 1].to : 0;
    const dark = all.findIndex((one) => !one.isReady && !sheets.has(one.block));
    const end = dark < 0 ? all.at(-1).to : dark ? all[dark - 1].to : 0;
    const canPlay = video && (video.currentSrc || video.src) && video.readyState >= 2;
    if (state !== 'running' && state !== 'queued' && (!sheets.size || canPlay || video?.src)) { hide(); return; }
    if (!canPlay || !readyTo) {
      at = isOn() && at + passed < end ? at + passed : 0;
      show();
      return;
    }
    if (!heard.has(video)) { heard.add(video); video.addEventListener('play', hide); }
    if (isOn()) {
      if (!video.paused) video.pause();  // it starts by itself when it is made
      at += passed;
      if (at >= end) playFrom(video, 0);
      else if (at < readyTo - 0.2 && !isHeld) playFrom(video, at);
      return;
    }
    if (video.currentTime < readyTo - 0.15 && !video.ended) return;
    if (end > readyTo + 0.05) { video.pause(); at = readyTo; show(); } else { hasLooped = true; playFrom(video, 0); }
  };

  const tick = () => {
    const strip = element.querySelector('.strip'), now = element.querySelector('.board');
    if (!strip || !now) { hide(); next.hidden = true; return; }
    if (now.dataset.job !== known) { known = now.dataset.job; sheets.clear(); asked.clear(); at = 0; shown = ''; hasLooped = false; hide(); }
    const all = cells(strip), ready = all.filter((one) => one.isReady).length;
    if (ready !== numReady) { numReady = ready; hasLooped = false; }
    all.forEach(fetchLook);
    move(now.dataset.state, all, document.querySelector('#video video'));
    sayNext(now.dataset.state, all);
    if (isOn()) { paintStage(all); say(all, Number(strip.dataset.steps), strip.dataset.waits); }
    return all;
  };

  words.addEventListener('click', () => { isPaused = isHeld = !isPaused; tick(); });
  element.addEventListener('click', (event) => {
    const block = event.target.closest('.block');
    if (!block) return;
    if (block.classList.contains('ready')) { if (document.querySelector('#video video')) hide(); }
    else if (block.dataset.look) { document.querySelector('#video video')?.pause(); at = Number(block.dataset.from); show(); tick(); }
  });
  const timer = setInterval(() => {
    if (!element.isConnected) { clearInterval(timer); layer.remove(); return; }
    tick();
  }, 50);
  watch('value', () => { const all = tick(); if (all) paintCells(all); });
  return {get at() { return isOn() && sheets.size ? at : null; }};
})();
