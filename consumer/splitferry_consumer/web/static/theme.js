// Before the first paint, so that a remembered theme does not flash the other one.
"use strict";

try {
  const theme = localStorage.getItem("splitferry-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage here: the system's theme it is.
}
