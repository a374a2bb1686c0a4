// Parts of a page that the server renews over the page's one event stream. (htmx's own SSE extension swaps HTML; here
// half of the events are series for a chart, so the browser's EventSource serves better and costs nothing.)
export function renew(fragments) {
  for (const [id, html] of Object.entries(fragments)) {
    const place = document.getElementById(id);
    if (place) place.replaceChildren(...new DOMParser().parseFromString(html, "text/html").body.childNodes);
  }
}
// A hidden page holds no connection: a browser opens six to one host at most, and tabs are many.
export function listen(address, handlers) {
  let source = null;
  let ended = false;
  const close = () => { source?.close(); source = null; };
  function open() {
    if (source || ended || document.hidden) return;
    source = new EventSource(address); // reconnects by itself
    for (const [name, handle] of Object.entries(handlers)) if (name !== "end") source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
    source.addEventListener("end", () => { ended = true; close(); handlers.end?.(); });
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}
