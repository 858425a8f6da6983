// Light or dark? As the system says, until the reader chooses; the choice stays in this browser.

import { button } from "./dom.js";

const STORED = "jax_client_theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

/** Apply the theme, and return the button that changes it; `changed` is called after. */
export function installTheme(changed) {
  const kept = () => {
    try {
      return localStorage.getItem(STORED);
    } catch {
      return null;
    }
  };
  let chosen = kept();
  const isDark = () => (chosen ? chosen === "dark" : dark.matches);
  const apply = () => {
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    toggle.textContent = isDark() ? "☀" : "☾";
    toggle.setAttribute("aria-label", isDark() ? "Use the light theme" : "Use the dark theme");
    changed();
  };
  const toggle = button(
    "☾",
    () => {
      chosen = isDark() ? "light" : "dark";
      try {
        localStorage.setItem(STORED, chosen);
      } catch {
        // A browser without storage keeps the choice as long as the page is open.
      }
      apply();
    },
    { class: "plain", title: "Light or dark" },
  );
  dark.addEventListener("change", apply);
  apply();
  return toggle;
}
