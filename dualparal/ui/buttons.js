// Runs once for each component with buttons of ours: they carry data-do and data-id, and each kind becomes an event of that
// component. A gallery's posters play while one hovers over them; names are edited in place.
const KINDS = ['show', 'halt', 'turn', 'reuse', 'remove', 'undo', 'resume', 'compare', 'star', 'again', 'carry', 'extend', 'frames', 'plain', 'all', 'side'];
const video = () => document.querySelector('#video video');

const saveFrame = (button) => {
  const source = video();
  if (!source?.videoWidth) return;
  const canvas = Object.assign(document.createElement('canvas'), {width: source.videoWidth, height: source.videoHeight});
  canvas.getContext('2d').drawImage(source, 0, 0);
  const name = `${button.dataset.name}-${source.currentTime.toFixed(2)}s.png`;
  canvas.toBlob((blob) => {
    const link = Object.assign(document.createElement('a'), {href: URL.createObjectURL(blob), download: name});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }, 'image/png');
};

const rename = (button) => {
  const title = button.parentNode, field = Object.assign(document.createElement('input'), {value: button.dataset.name, maxLength: 120});
  field.ariaLabel = 'name of the video';
  let isDone = false;
  const end = (isKept) => {
    if (isDone) return;
    isDone = true;
    if (isKept && field.value !== button.dataset.name) trigger('rename', {id: button.dataset.id, name: field.value});
    else { field.replaceWith(...before); button.focus(); }
  };
  const before = [...title.childNodes];
  title.replaceChildren(field);
  field.addEventListener('keydown', (event) => { if (event.key === 'Enter') end(true); if (event.key === 'Escape') end(false); });
  field.addEventListener('blur', () => end(true));
  field.select();
};

// Videos are chosen by their boxes, on whichever page of the gallery and wall of takes they are, to be shown side by side.
const picked = (document.picked ??= new Set());
const showPicked = () => {
  for (const bar of document.querySelectorAll('.picked')) {
    const {fewest, most} = bar.dataset;
    bar.hidden = !picked.size;
    bar.querySelector('b').textContent = picked.size < fewest ? 'one chosen, choose another' : `${picked.size} chosen`;
    bar.querySelector('[data-do=side]').hidden = picked.size < fewest;
    for (const box of document.querySelectorAll('[data-pick]')) {
      box.checked = picked.has(box.dataset.pick);
      box.disabled = picked.size >= most && !box.checked;
    }
  }
};
element.addEventListener('change', (event) => {
  const {pick} = event.target.dataset;
  if (!pick) return;
  if (event.target.checked) picked.add(pick); else picked.delete(pick);
  showPicked();
});

element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (!button || button.disabled) return;
  const kind = button.dataset.do;
  if (kind === 'rename') { rename(button); return; }
  if (kind === 'frame') { saveFrame(button); return; }
  if (kind === 'own') { location.hash = `gallery=${encodeURIComponent(localStorage.getItem('dualparal-before'))}`; location.reload(); return; }
  if (kind === 'unpick') { picked.clear(); showPicked(); return; }
  if (kind === 'side') { trigger('side', {id: [...picked].join(',')}); return; }
  if (kind === 'remove') { button.dataset.id.split(',').forEach((id) => picked.delete(id)); showPicked(); }
  if (kind === 'show' && element.closest('#gallery')) document.querySelector('#stage')?.scrollIntoView({behavior: 'smooth', block: 'start'});
  if (KINDS.includes(kind)) trigger(kind, {id: button.dataset.id});
});

// Posters: the video itself while one hovers over it, without sound, from its beginning.
const still = (poster) => poster.querySelector('video')?.remove();
element.addEventListener('pointerover', (event) => {
  const poster = event.target.closest?.('.poster[data-video]');
  if (!poster || event.pointerType === 'touch' || poster.querySelector('video')) return;
  const moving = Object.assign(document.createElement('video'), {muted: true, loop: true, autoplay: true, playsInline: true, src: poster.dataset.video});
  moving.setAttribute('aria-hidden', 'true');
  moving.tabIndex = -1;
  moving.addEventListener('playing', () => moving.classList.add('moves'));
  poster.append(moving);
});
element.addEventListener('pointerout', (event) => {
  const poster = event.target.closest?.('.poster[data-video]');
  if (poster && !poster.contains(event.relatedTarget)) still(poster);
});
watch('value', () => {
  if (element.querySelector('[data-pick]')) showPicked();
  const back = element.querySelector('.own-gallery');
  if (back) back.hidden = !localStorage.getItem('dualparal-before');
});
