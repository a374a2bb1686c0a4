// The frame of every page: theme, keyboard, copying, and what htmx leaves to us. No inline script anywhere.

import { listen, renew } from "./live.js";

const THEMES = ["auto", "light", "dark"];
const announce = (text) => { document.getElementById("announce").textContent = text; };

function nextTheme() {
  const root = document.documentElement;
  const index = (THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length;
  root.dataset.theme = THEMES[index];
  // A cookie and not localStorage: the server writes the theme into the page, so that nothing flashes.
  document.cookie = `theme=${THEMES[index]}; path=/; max-age=31536000; samesite=lax`;
  announce(document.getElementById("announce").dataset.themes.split("|")[index]);
  document.dispatchEvent(new CustomEvent("sihe:theme"));
}

async function copy(button) {
  await navigator.clipboard.writeText(button.dataset.copy);
  announce(document.getElementById("announce").dataset.copied);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if ("themeNext" in button.dataset) nextTheme();
  if ("shortcuts" in button.dataset) document.getElementById("shortcuts").showModal();
  if ("copy" in button.dataset) copy(button);
});

// A language link keeps the other parameters of the page.
for (const link of document.querySelectorAll('a[href^="?lang="]')) {
  const address = new URL(location.href);
  address.searchParams.set("lang", new URL(link.href).searchParams.get("lang"));
  link.href = address.pathname + address.search;
}

for (const field of document.querySelectorAll("select[data-submit]")) field.addEventListener("change", () => field.form.requestSubmit());

// ---- keyboard: g then a letter goes to a page; / focuses the page's own search; ? shows them all ------------------
let pendingGo = -Infinity;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  if (performance.now() - pendingGo < 1500) {
    pendingGo = -Infinity;
    const link = document.querySelector(`nav a[data-key="${CSS.escape(event.key)}"]`);
    if (link) { event.preventDefault(); link.click(); }
  } else if (event.key === "g") {
    pendingGo = performance.now();
  } else if (event.key === "?") {
    document.getElementById("shortcuts").showModal();
  } else if (event.key === "t") {
    nextTheme();
  } else if (event.key === "/") {
    const field = document.querySelector("[data-focus]");
    if (field) { event.preventDefault(); field.focus(); }
  }
});

for (const element of document.querySelectorAll("[data-live]")) {
  // What a finished job shows is a page of its own: it is loaded, not patched in.
  listen(element.dataset.live, { status: renew, end: () => "reload" in element.dataset && location.reload() });
}

// ---- forms that ask before they do something that cannot be undone ------------------------------------------------
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) { event.preventDefault(); event.stopImmediatePropagation(); }
}, true);
