// Keeps a page fresh: when the control plane says that something happened, the page's main part is fetched again.
"use strict";
(() => {
  const dot = document.getElementById("live");
  if (!dot || !window.EventSource) return;
  let waiting = false;
  const say = (text, on) => { dot.textContent = text; dot.classList.toggle("on", on); };
  const busy = () => document.activeElement && document.activeElement.closest("form");
  const refresh = async () => {
    waiting = false;
    if (busy()) return;
    const open = [...document.querySelectorAll("main details")].map((part) => part.open);
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, redirect: "error" });
      if (!answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("main");
      if (!fresh) return;
      [...fresh.querySelectorAll("details")].forEach((part, at) => { if (at < open.length) part.open = open[at]; });
      document.querySelector("main").replaceWith(fresh);
    } catch { say("offline", false); }
  };
  const soon = () => { if (!waiting) { waiting = true; setTimeout(refresh, 400); } };
  const source = new EventSource("/v1/events");
  const kinds = ["device.enrolled", "device.status", "device.offered", "device.withdrawn", "device.revert_ordered",
    "device.labelled", "device.retired", "rollout.created", "rollout.phase", "rollout.wave", "rollout.closed",
    "rollout.joined", "release.published", "channel.set", "blueprint.applied", "server.restored"];
  kinds.forEach((kind) => source.addEventListener(kind, soon));
  source.onopen = () => say("live", true);
  source.onerror = () => say("reconnecting", false);
  setInterval(soon, 5000);
})();
