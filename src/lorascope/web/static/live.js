// What HTMX does not do: the title and a notification as a run changes its state, and values that a page keeps in sync.
"use strict";
(() => {
  const title = document.title;
  let before = null;

  const follow = () => {
    const status = document.querySelector("[data-run][data-state]");
    if (!status) return;
    const { run, state } = status.dataset;
    document.title = `${state}: ${title}`;
    const button = status.querySelector("[data-notify]");
    if (button && "Notification" in window && Notification.permission === "default") {
      button.hidden = state !== "running" && state !== "waiting";
      button.addEventListener("click", () => Notification.requestPermission().then(() => { button.hidden = true; }));
    }
    const ended = ["done", "failed", "paused"].includes(state);
    if (before === "running" && ended && "Notification" in window && Notification.permission === "granted") {
      new Notification(`lorascope: ${run} is ${state}`);
    }
    before = state;
  };

  document.addEventListener("htmx:sseMessage", follow);
  document.addEventListener("DOMContentLoaded", follow);
  // A notice is gone once something else worked.
  document.addEventListener("htmx:afterRequest", (event) => {
    const retargeted = event.detail.xhr && event.detail.xhr.getResponseHeader("hx-retarget");
    const notice = document.getElementById("notice");
    if (retargeted) notice.scrollIntoView({ block: "nearest" });
    else if (event.detail.successful) notice.replaceChildren();
  });
  document.addEventListener("htmx:sendError", () => {
    const text = document.createElement("p");
    text.className = "notice";
    text.textContent = "The server does not answer: start it again with the same command. What runs goes on meanwhile.";
    document.getElementById("notice").replaceChildren(text);
  });
})();
