// Keys press the buttons of the page; a lost connection is told in words; after an answer the new question is read out.
(function () {
  "use strict";
  function tell(text) {
    var notice = document.getElementById("notice");
    notice.textContent = text;
    notice.classList.toggle("shown", text !== "");
  }
  // Several questions on one page: a key answers the first one that is open; the last answer sends the page.
  function answerNext(key) {
    var open = Array.prototype.filter.call(document.querySelectorAll("#task fieldset.ask"), function (set) {
      return !set.querySelector("input:checked");
    });
    var inputs = open.length ? open[0].querySelectorAll("input[data-keys]") : [];
    for (var i = 0; i < inputs.length; i++) {
      if (inputs[i].dataset.keys.split(" ").indexOf(key) < 0) continue;
      inputs[i].checked = true;
      inputs[i].focus();
      if (open.length === 1) inputs[i].form.querySelector("button.go").click();
      return true;
    }
    return false;
  }
  document.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    // A question that has just been swapped in: nobody has seen it, and its buttons would send the page as a whole.
    if (document.querySelector("#task .htmx-added, #task.htmx-added, .htmx-settling")) return event.preventDefault();
    var key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (answerNext(key)) return event.preventDefault();
    var buttons = document.querySelectorAll("#task button[data-keys]");
    for (var i = 0; i < buttons.length; i++) {
      if (buttons[i].dataset.keys.split(" ").indexOf(key) >= 0) {
        event.preventDefault();
        buttons[i].click();
        return;
      }
    }
  });
  document.addEventListener("htmx:afterSwap", function () {
    tell("");
    var question = document.getElementById("question");
    if (question) question.focus({ preventScroll: true });
  });
  document.addEventListener("htmx:responseError", function (event) {
    var text = event.detail.xhr.responseText;
    tell(text.length > 0 && text.length < 300 ? text : "Your answer was not kept: the server failed. Try again.");
  });
  ["htmx:sendError", "htmx:timeout"].forEach(function (name) {
    document.addEventListener(name, function () {
      tell("Your answer was not confirmed: the server did not reply. Try again; nothing is counted twice.");
    });
  });
})();
