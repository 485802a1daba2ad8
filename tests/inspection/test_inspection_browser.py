"""The page of ``lococo inspect`` as a real browser shows it: what is listed, which colours, what hovering does."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import pytest
import torch
from tiny import tiny_ids, tiny_llama

from lococo import LoCoCoConfig, patched
from lococo.inspection import trace
from lococo.inspection.decisions import OUTCOMES
from lococo.inspection.page import page, page_data

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
LENGTH, THRESHOLD = 93, 0.02
CONFIG = LoCoCoConfig(16, block_size=8, gate_init=0.7)
KEPT, HELD = (85, 168, 104), (221, 132, 82)  # colours of tokens: kept at all, held by the slot in question

# Stands in for a person with a mouse, and writes down what is on the screen.
PROBE = """
<script>
const all = selector => [...document.querySelectorAll(selector)];
const style = getComputedStyle;
const enter = element => element.dispatchEvent(new MouseEvent("mouseenter"));
const leave = element => element.dispatchEvent(new MouseEvent("mouseleave"));
const pick = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("change"));
};
const isOnTop = element => {
  element.scrollIntoView({ block: "nearest" });
  const box = element.getClientRects()[0];
  const there = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return element === there || element.contains(there);
};
const onScreen = () => ({
  chosen: ["layer", "head"].map(id => +document.getElementById(id).value),
  tokens: all("#text span").map(span => style(span).backgroundColor),
  outlined: all("#text span").flatMap((span, token) => style(span).outlineStyle === "solid" ? [token] : []),
  headings: all("#slots h2").map(heading => heading.textContent),
  slots: all("#slots .slot").map(box => [style(box).borderLeftColor, style(box).backgroundColor]),
  labels: all("#slots .slot").map(box => box.textContent),
  detail: document.getElementById("detail").textContent,
  why: all("#why .reason").map(line => line.textContent),
});
const report = { errors, start: onScreen() };
report.texts = all("#text span").map(span => span.textContent);
report.elements = all("#text *").length;
report.hidden = all("#text span, #slots .slot").filter(box => !isOnTop(box)).map(box => box.textContent);
pick("layer", 1);
pick("head", 0);
report.picked = onScreen();
report.slots = all("#slots .slot").map(box => {
  enter(box);
  const found = onScreen();
  leave(box);
  return found;
});
report.left = onScreen();
report.held = all("#text span").map(span => {
  enter(span);
  const found = onScreen();
  leave(span);
  return found;
});
const tokens = all("#text span");
[20, 60, 20].forEach(token => tokens[token].click());
report.pinned = onScreen();
pick("head", 1);
report.repinned = onScreen();
report.loaded = performance.getEntriesByType("resource").map(entry => entry.name);
const written = document.createElement("pre");
written.id = "report";
written.textContent = JSON.stringify(report);
document.body.append(written);
</script>
"""
ERRORS = '<script>const errors = []; addEventListener("error", event => errors.push(event.message));</script>'


def chromium(url, folder, *arguments):
    """Standard output of a browser without a window that opens a page, and nothing else."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.fail("there is no Chromium: install Debian's package chromium, or run pytest -m 'not browser'")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [binary, *options, *quiet, f"--user-data-dir={folder / 'profile'}", *arguments, url]
    environment = {**os.environ, "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout


class Report(HTMLParser):
    """The text of the element that the probe wrote."""

    def __init__(self, document):
        super().__init__()
        self.text, self.inside = "", False
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = dict(attributes).get("id") == "report"

    def handle_data(self, data):
        self.text += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


@pytest.fixture(scope="module")
def traces():
    torch.manual_seed(0)
    with patched(tiny_llama(), CONFIG) as model:
        return trace(model, tiny_ids(1, LENGTH))


@pytest.fixture(scope="module")
def data(traces):
    tokens = ["</script><b>", "{{data}}", '"&', "\n", *(f" word{index}" for index in range(LENGTH - 4))]
    return page_data(traces, tokens, "a title", THRESHOLD)


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    opened = folder / "page.html"
    written = page(data).replace("<head>", f"<head>{ERRORS}").replace("</body>", f"{PROBE}</body>")
    opened.write_text(written, encoding="utf-8")
    return json.loads(Report(chromium(f"{opened.as_uri()}#layer=1&head=1&slot=5", folder, "--dump-dom")).text)


def colour(written):
    """("rgb", alpha) of a computed colour."""
    *rgb, alpha = [*map(float, re.findall(r"[\d.]+", written)), 1.0][:4]
    return tuple(map(int, rgb)), alpha


def listed(weights):
    """Places of the weights that the page lists, heaviest first."""
    places = (weights >= THRESHOLD).nonzero()[:, 0].tolist()
    return sorted(places, key=lambda place: (-weights[place].item(), place))


def of_head(traces, layer, head):
    return next(each for each in traces if (each.layer, each.head) == (layer, head))


def in_groups(kinds):
    """Slots in the order of the page: group after group."""
    order = ["sink", "heavy", "recent", "fused", "open"]
    return sorted(range(len(kinds)), key=lambda slot: order.index(kinds[slot]))


def test_page_runs_without_an_error_and_loads_nothing(report, data):
    assert report["errors"] == [] and report["loaded"] == []
    assert report["texts"] == data["tokens"] and report["elements"] == LENGTH
    assert report["hidden"] == []


def test_slots_are_listed_by_kind_with_their_heaviest_token(report, data, traces):
    shown = of_head(traces, 1, 0)
    kinds = [kind for kind in ("sink", "heavy", "recent", "fused", "open") if kind in shown.kinds]
    assert report["picked"]["chosen"] == [1, 0] and len(kinds) == 5
    assert report["picked"]["headings"] == [
        f"{'open block' if kind == 'open' else kind} ({shown.kinds.count(kind)})" for kind in kinds
    ]
    labels = []
    for slot in in_groups(shown.kinds):
        places = listed(shown.weights[slot])
        more = f" +{len(places) - 1}" if len(places) > 1 else ""
        first = data["tokens"][places[0]].replace(" ", "·").replace("\n", "⏎") if places else "…"
        labels.append(first + more)
    assert report["picked"]["labels"] == labels
    assert any("+" in label for label in labels), "nothing was blended"
    borders = [border for border, _ in report["picked"]["slots"]]
    assert len(set(borders)) == len(kinds)  # a colour for every kind


def test_colour_of_a_token_is_how_much_of_it_is_kept(report, traces):
    kept = of_head(traces, 1, 0).weights.sum(0).clamp(max=1)
    for written, share in zip(report["picked"]["tokens"], kept.tolist(), strict=True):
        rgb, alpha = colour(written)
        assert alpha == pytest.approx(share, abs=0.005) and (rgb == KEPT or alpha == 0)
    assert report["picked"]["outlined"] == [] and "Hover over a slot" in report["picked"]["detail"]


def test_hovering_over_a_slot_shows_its_tokens_and_weights(report, data, traces):
    shown, before = of_head(traces, 1, 0), report["picked"]
    assert len(report["slots"]) == len(shown.kinds)
    for place, (slot, found) in enumerate(zip(in_groups(shown.kinds), report["slots"], strict=True)):
        weights, places = shown.weights[slot], listed(shown.weights[slot])
        assert found["outlined"] == sorted(places)
        for token in range(LENGTH):
            rgb, alpha = colour(found["tokens"][token])
            if token in places:
                assert rgb == HELD and alpha == pytest.approx(0.15 + 0.85 * weights[token].item(), abs=0.005)
            else:
                assert found["tokens"][token] == before["tokens"][token]
        highlighted = [background for _, background in found["slots"]]
        assert highlighted[place] == found["slots"][place][0] != before["slots"][place][1]
        assert highlighted[:place] + highlighted[place + 1 :] == [
            background for _, background in before["slots"][:place] + before["slots"][place + 1 :]
        ]
        assert found["detail"].startswith(f"slot {slot}, {shown.kinds[slot]}, {len(places)} token")
        assert re.findall(r"@(\d+) (\d\.\d{3})", found["detail"]) == [
            (str(token), f"{round(1000 * weights[token].item()) / 1000:.3f}") for token in places
        ]
        others = re.findall(rf"others each below {THRESHOLD} (\d\.\d{{3}})", found["detail"])
        missing = 1 - weights[places].sum().item()
        assert list(map(float, others)) == pytest.approx([missing] if others else [], abs=0.01)
        assert bool(others) or missing < THRESHOLD + 0.01
    assert report["left"] == before


def test_hovering_over_a_token_shows_its_slots(report, traces):
    shown = of_head(traces, 1, 0)
    order = in_groups(shown.kinds)
    for token, found in enumerate(report["held"]):
        slots = [slot for slot in range(len(order)) if shown.weights[slot, token] >= THRESHOLD]
        lit = [slot for slot, (border, background) in zip(order, found["slots"], strict=True) if border == background]
        assert sorted(lit) == slots
        assert found["outlined"] == [token] and found["detail"].startswith(f"token @{token} ")
        assert sorted(map(int, re.findall(r"slot (\d+) ", found["detail"]))) == slots


def reason_of(decisions, token):
    """What the page is to say of a token after its name: what happened, when, and its rank."""
    if decisions.at[token] < 0:
        return ["waits in the open block"]
    outcome = OUTCOMES[decisions.outcome[token]]
    block, seen, candidates, kept = decisions.compressions[decisions.at[token]]
    said = f"{'dropped' if outcome == 'dropped' else 'kept'} after block {block} ({seen} tokens), "
    slot, rank = decisions.slot[token].item(), decisions.rank[token].item()
    how = {"sink": "as one of the first", "recent": "as one of the last", "heavy": "as a heavy hitter"}
    how |= {"fused": f"as the beginning of fused slot {slot}", "dropped": f"into fused slot {slot}"}
    return [said + how[outcome], f"rank {rank} of {candidates}, the first {kept} kept" if rank else ""]


def test_hovering_over_a_token_tells_why_it_was_kept_or_dropped(report, traces):
    decisions, told = of_head(traces, 1, 0).decisions, set()
    for token, found in enumerate(report["held"]):
        (reason,) = found["why"]
        outcome = OUTCOMES[decisions.outcome[token]]
        told.add(outcome)
        assert f"@{token} " in reason and all(words in reason for words in reason_of(decisions, token))
        scores = re.findall(r"; score (\S+)", reason)
        if decisions.rank[token] == 0:
            assert not scores and "rank" not in reason
        else:
            assert float(scores[0]) == pytest.approx(decisions.score[token].item(), rel=0.06)
    assert told >= {"open", "sink", "recent", "fused", "dropped"}


def test_what_is_clicked_stays_and_is_told_of_every_head(report, traces):
    for shown, head, hovered in ((report["pinned"], 0, "@20 "), (report["repinned"], 1, "")):
        decisions = of_head(traces, 1, head).decisions
        kept, last = shown["why"]  # the mouse is on the token that was let go, until another head is chosen
        assert "@60 " in kept and all(words in kept for words in reason_of(decisions, 60))
        assert hovered in last if hovered else not last


def test_address_chooses_layer_head_and_slot(report, traces):
    start, shown = report["start"], of_head(traces, 1, 1)
    assert start["chosen"] == [1, 1]
    assert start["outlined"] == sorted(listed(shown.weights[5])) != []
    assert start["detail"].startswith(f"slot 5, {shown.kinds[5]}, ")


def test_screenshot_has_the_colours(data, tmp_path):
    opened, picture = tmp_path / "page.html", tmp_path / "page.png"
    opened.write_text(page(data), encoding="utf-8")
    chromium(opened.as_uri(), tmp_path, f"--screenshot={picture}", "--window-size=1000,700")
    pixels = (255 * matplotlib.image.imread(picture)[..., :3]).round()
    assert pixels.shape[:2] == (700, 1000)

    def share(rgb):
        return float((abs(pixels - rgb).max(-1) <= 2).mean())

    assert share(KEPT) > 0.005 and share((255, 255, 255)) > 0.5 and share((34, 34, 34)) > 0.0005
