// The takes in step: each tile draws the picture of the same moment out of the sheets of its blocks, over and over.
(() => {
  const COLUMNS = 8, EVERY_MS = 250;  // a picture stands for four frames
  const sheets = new Map();  // url → image
  const isStill = window.matchMedia('(prefers-reduced-motion: reduce)').matches;
  let at = 0;
  const image = (url) => {
    if (!sheets.has(url)) {
      if (sheets.size > 400) sheets.clear();
      const made = new Image();
      made.src = url;
      sheets.set(url, made);
    }
    const found = sheets.get(url);
    return found.complete && found.naturalWidth ? found : null;
  };
  const draw = (tile, place) => {
    let left = place;
    for (const {url, pictures} of JSON.parse(tile.dataset.looks)) {
      if (left >= pictures) { left -= pictures; image(url); continue; }
      const sheet = image(url), canvas = tile.firstChild;
      if (!sheet) return;
      const columns = Math.min(COLUMNS, pictures), rows = Math.ceil(pictures / columns);
      const w = sheet.naturalWidth / columns, h = sheet.naturalHeight / rows, scale = Math.max(1, Math.round(320 / w));
      if (canvas.width !== w * scale || canvas.height !== h * scale) { canvas.width = w * scale; canvas.height = h * scale; }
      const context = canvas.getContext('2d');
      context.imageSmoothingQuality = 'high';
      context.drawImage(sheet, (left % columns) * w, Math.floor(left / columns) * h, w, h, 0, 0, canvas.width, canvas.height);
      tile.dataset.shows = place;
      return;
    }
  };
  const tick = () => {
    if (!element.isConnected) { clearInterval(timer); return; }
    const tiles = [...element.querySelectorAll('.look')];
    const lengths = tiles.map((tile) => JSON.parse(tile.dataset.looks).reduce((sum, look) => sum + look.pictures, 0)).filter(Boolean);
    if (!lengths.length) return;
    at = isStill ? Math.floor(Math.min(...lengths) / 2) : (at + 1) % Math.min(...lengths);
    for (const tile of tiles) draw(tile, at);
  };
  const timer = setInterval(tick, EVERY_MS);
  watch('value', () => { for (const tile of element.querySelectorAll('.look')) draw(tile, at); });
})();
