// Says when the server does not answer, and goes on by itself when it does again: what is typed is kept (draft.js), and so is the
// job that is shown, so that the page is opened anew. One answer is not enough for that: a server that is closing may still give it,
// and a page opened from it has nothing to show.
(() => {
  const EVERY_MS = 4000, AGAIN_MS = 1500, PATIENCE_MS = 30000, MISSES = 2, ANSWERS = 2;
  const healthz = `${document.querySelector('meta[name=dualparal-root]')?.content || ''}healthz`;
  let run = null, misses = 0, answers = 0, isCut = false, isLeaving = false;
  window.addEventListener('pagehide', () => { isLeaving = true; });
  window.addEventListener('pageshow', () => { isLeaving = false; });

  // Gradio, once it has lost its stream, asks for the app's id and opens the page anew at the first answer: here it gets none.
  const fetched = window.fetch;
  window.fetch = function (asked, ...more) {
    if (!new URL(asked?.url ?? asked, location.href).pathname.endsWith('/app_id')) return fetched.call(this, asked, ...more);
    isCut = true;
    return Promise.reject(new TypeError('away.js finds out when the server is back'));
  };

  const away = () => {
    if (document.documentElement.classList.contains('away')) return;
    document.documentElement.classList.add('away');
    const told = document.createElement('p');
    told.id = 'away';
    told.setAttribute('role', 'alert');
    told.innerHTML = '<b>The server does not answer.</b> What was made is kept, and what you typed; this page goes on by itself when it is back.';
    document.body.prepend(told);
    const say = (selector, text) => { const found = document.querySelector(selector); if (found) found.textContent = text; };
    say('.chip b', 'Server away');
    const board = document.querySelector('.board:is(.running, .queued)');
    if (board) { say('.headline b', 'Waiting for the server'); say('.headline span', ''); board.dataset.state = 'away'; }
    document.title = 'Server away · DualParal Studio';
  };

  const ask = async () => {
    try {
      const answer = await fetched(healthz, {cache: 'no-store', signal: AbortSignal.timeout(PATIENCE_MS)});
      await answer.json();  // a proxy in front of a server that is away answers too, in its own words
      const now = answer.headers.get('x-run');
      if (isCut || misses >= MISSES || (run && now && now !== run)) {
        if (++answers >= ANSWERS) { location.reload(); return; }
      } else {
        run = now; misses = 0;
      }
    } catch {
      answers = 0;
      if (!isLeaving && ++misses >= MISSES) away();
    }
    setTimeout(ask, misses || answers || isCut ? AGAIN_MS : EVERY_MS);
  };
  setTimeout(ask, AGAIN_MS);
})();
