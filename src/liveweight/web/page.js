// What the browser does by itself: keyboard shortcuts, the theme's cookie, and keeping a growing answer in view.
// A shortcut presses the button that carries it as data-key; inside a turn of the chat it is the focused turn's button.
(() => {
  const KEYS = "liveweight-keys";
  const turns = () => [...document.querySelectorAll("article.turn")];
  const usable = (element) => element && !element.disabled && element.getClientRects().length > 0;
  const typing = (element) => element.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable=true]");
  const current = () => document.activeElement?.closest?.("article.turn") ?? turns().at(-1);

  function carrier(key) {
    const wanted = `[data-key="${CSS.escape(key)}"]`;
    const own = [...(current()?.querySelectorAll(wanted) ?? [])].find(usable);
    return own ?? [...document.querySelectorAll(wanted)].find((each) => !each.closest("article.turn") && usable(each));
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const dialog = document.querySelector(".q-dialog__inner");
    if (event.key === "Escape" && !dialog) {
      carrier("Escape")?.click();
      return;
    }
    if (dialog || typing(event.target) || localStorage.getItem(KEYS) === "off") return;
    if (event.key === "j" || event.key === "k") {
      const all = turns();
      const at = all.indexOf(document.activeElement?.closest?.("article.turn"));
      const next = at < 0 ? all.at(-1) : all[at + (event.key === "j" ? 1 : -1)];
      next?.focus();
      next?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "/") {
      document.querySelector("[data-first] textarea, [data-first] input, textarea[data-first], input[data-first]")?.focus();
    } else {
      const found = carrier(event.key);
      if (!found) return;
      found.click();
    }
    event.preventDefault();
  });

  document.addEventListener("change", (event) => {
    if (event.target.matches?.("input[data-keys]")) {
      localStorage.setItem(KEYS, event.target.checked ? "on" : "off");
    }
  });

  window.liveweight = {
    theme: (name) => {
      document.cookie = `liveweight-theme=${name}; path=/; max-age=31536000; samesite=lax`;
    },
    showKeys: () => {
      const box = document.querySelector("input[data-keys]");
      if (box) box.checked = localStorage.getItem(KEYS) !== "off";
    },
    // A range keeps its own value; a prop would be put back at every redraw while it is being dragged.
    range: (id, value) => {
      const set = (tries) => {
        const input = document.getElementById(`c${id}`);
        if (input) input.value = value;
        else if (tries > 0) setTimeout(() => set(tries - 1), 30);
      };
      set(20);
    },
    focus: (selector, select = false) =>
      setTimeout(() => {
        const found = document.querySelector(selector);
        found?.focus();
        if (select) found?.select();
      }, 60),
  };

  let atEnd = true;
  const room = () => document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  window.addEventListener("scroll", () => (atEnd = room() < 120), { passive: true });
  new MutationObserver(() => {
    if (atEnd && document.querySelector('.answer[aria-busy="true"]')) {
      window.scrollTo(0, document.documentElement.scrollHeight);
    }
  }).observe(document.documentElement, { subtree: true, childList: true, characterData: true });
})();
