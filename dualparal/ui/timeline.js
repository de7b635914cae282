// Shots without their syntax: a row of controls for every line of the prompt that begins with a duration. The prompt's text is
// the only truth; whatever is changed here is written there. What a line means, the server says.
const LINE = /^[ \t]*\[[ \t]*(\d[^\]\n]*)\][ \t]*(.*)$/;
const INSIDE = /^(\d+(?:\.\d+)?)\s*s(?:\s+(\S+))?$/i;
const words = element.querySelector('.shots-editor').dataset.transitions.split(',');
const list = element.querySelector('ol');
const box = () => document.querySelector('#prompt textarea');
let seen = null, pending = 0, hadShots = false;

const parse = (text) => {
  const before = [], shots = [];
  for (const line of text.split('\n')) {
    const found = LINE.exec(line);
    if (found) {
      const inside = INSIDE.exec(found[1].trim());
      shots.push({seconds: inside ? inside[1] : '', how: inside ? (inside[2] || 'switch').toLowerCase() : '', text: [found[2]]});
    } else (shots.length ? shots[shots.length - 1].text : before).push(line);
  }
  return {prompt: before.join('\n').trim(), shots: shots.map((shot) => ({...shot, text: shot.text.join('\n').trim()}))};
};
const join = (film) => [
  ...(film.prompt ? [film.prompt] : []),
  ...film.shots.map((shot) => `[${shot.seconds || 1}s${words.includes(shot.how) && shot.how !== 'switch' ? ` ${shot.how}` : ''}] ${shot.text}`.trimEnd()),
].join('\n');

const write = (film) => {
  const area = box(), text = join(film);
  Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(area, text);
  area.dispatchEvent(new Event('input', {bubbles: true}));
  look();
};
const change = (act) => { const film = parse(box().value); act(film.shots, film); write(film); };

const row = (number) => {
  const item = document.createElement('li');
  item.innerHTML = `<b></b><label><input type="number" class="secs" min="0.1" step="0.5"><span>s</span></label><select class="how"></select>
    <span class="moves"><button type="button" class="up">↑</button><button type="button" class="down">↓</button><button type="button" class="gone">✕</button></span>
    <textarea class="text" rows="1"></textarea>`;
  const part = (name) => item.querySelector(`.${name}`);
  item.querySelector('b').textContent = number + 1;
  for (const word of words) part('how').add(new Option(word, word));
  const named = {secs: 'seconds of', how: 'how it begins,', up: 'move up', down: 'move down', gone: 'remove', text: 'text of'};
  for (const [name, words] of Object.entries(named)) part(name).setAttribute('aria-label', `${words} shot ${number + 1}`);
  part('text').placeholder = number ? 'what happens now' : 'what happens first';
  part('secs').addEventListener('input', () => {
    if (part('secs').value) change((shots) => { shots[number].seconds = part('secs').value; });
  });
  part('how').addEventListener('change', () => change((shots) => { shots[number].how = part('how').value; }));
  part('text').addEventListener('input', () => change((shots) => { shots[number].text = part('text').value; }));
  const move = (by) => {
    change((shots) => { shots.splice(number + by, 0, shots.splice(number, 1)[0]); });
    const moved = list.children[number + by]?.querySelector(by < 0 ? '.up' : '.down');
    (moved?.disabled ? list.children[number + by].querySelector('.secs') : moved)?.focus();
  };
  part('up').addEventListener('click', () => move(-1));
  part('down').addEventListener('click', () => move(1));
  part('gone').addEventListener('click', () => change((shots) => { shots.splice(number, 1); }));
  return item;
};

const show = (shots) => {
  while (list.children.length > shots.length) list.lastChild.remove();
  while (list.children.length < shots.length) list.append(row(list.children.length));
  shots.forEach((shot, number) => {
    const item = list.children[number];
    const set = (name, value) => {
      const part = item.querySelector(`.${name}`);
      if (part !== document.activeElement && part.value !== value) part.value = value;
    };
    set('secs', shot.seconds);
    set('how', shot.how);
    set('text', shot.text);
    item.querySelector('.how').disabled = number === 0;
    item.querySelector('.up').disabled = number === 0;
    item.querySelector('.down').disabled = number === shots.length - 1;
  });
};

const look = () => {
  if (!element.isConnected) { clearInterval(timer); return; }
  const area = box();
  if (!area || area.value === seen) return;
  seen = area.value;
  const {shots} = parse(seen);
  show(shots);
  document.querySelector('#seconds')?.classList.toggle('from-shots', shots.length > 0);
  if (!shots.length && !hadShots) return;
  hadShots = shots.length > 0;
  clearTimeout(pending);
  pending = setTimeout(() => trigger('typed'), 250);
};
element.querySelector('.add-shot').addEventListener('click', () => {
  change((shots, film) => { shots.push({seconds: shots.length ? shots[shots.length - 1].seconds : '5', how: 'switch', text: ''}); });
  list.lastChild.querySelector('.text').focus();
});
const timer = setInterval(look, 200);
