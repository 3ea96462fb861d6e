"""The command line on a tiny random model: verbs, JSON, errors, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from liveweight.cli import app, output
from liveweight.cli.contrast import read_prompts
from liveweight.cli.demo import fingerprint
from liveweight.cli.steer import _side_by_side
from liveweight.engines.generation import Generation
from liveweight.errors import InvalidInput
from liveweight.live_model import LiveModel
from liveweight.methods import METHODS
from tests.tiny_workspace import LOOSE, OTHER, QUESTION, SHOUT, save_tiny_model, tiny_settings

Run = Callable[..., Result]
VERBS = [
    "demo",
    "chat",
    "ask",
    "fix",
    "bad",
    "good",
    "why",
    "neurons",
    "neuron",
    "clamp",
    "step",
    "contrast",
    "steer",
    "features",
    "diff",
    "changes",
    "protected",
    "show",
    "undo",
    "off",
    "on",
    "strength",
    "fold",
    "models",
    "super-weights",
    "massive",
    "sparsity",
    "quantize",
    "doctor",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program on a tiny model and a workspace of its own; `strict` keeps the usual budgets."""
    settings = tiny_settings(tmp_path)
    monkeypatch.setitem(METHODS, "shout", SHOUT)
    monkeypatch.setenv("LIVEWEIGHT_MODEL", settings.model)
    monkeypatch.setenv("LIVEWEIGHT_WORKSPACE", str(settings.workspace))
    monkeypatch.setenv("LIVEWEIGHT_CACHE_DIR", str(settings.cache_dir))
    monkeypatch.setenv("LIVEWEIGHT_METHODS__METHOD", "shout")
    monkeypatch.setenv("LIVEWEIGHT_GENERATION__MAX_TOKENS", "6")
    monkeypatch.setenv("LIVEWEIGHT_GUARD__PROBE_FILE", str(tmp_path / "probes.jsonl"))
    for name, value in LOOSE.items():
        monkeypatch.setenv(f"LIVEWEIGHT_GUARD__{name.upper()}", str(value))

    def invoke(*words: str, given: str | None = None, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words), input=given)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    return invoke


def parsed(result: Result) -> Any:
    return json.loads(result.stdout)


def told(result: Result) -> Any:
    """The error, which is the last line of stderr."""
    return json.loads(result.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    shown = run(verb, "--help").stdout
    assert "--json" in shown
    assert "--model" in shown


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys\nfrom liveweight.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_ask_prints_the_answer_and_nothing_else_on_stdout(run: Run) -> None:
    result = run("ask", QUESTION)
    as_json = parsed(run("ask", QUESTION, "--json"))
    assert result.stdout.strip() == as_json["text"]
    assert "r1" in result.stderr
    assert as_json["label"] == "r2"


def test_a_question_may_come_from_stdin(run: Run) -> None:
    assert parsed(run("ask", "-", "--json", given=QUESTION))["messages"][-1]["content"] == QUESTION


def test_fix_changes_show_off_on_strength_undo(run: Run) -> None:
    fixed = parsed(run("fix", QUESTION, "z", "--json"))
    assert (fixed["label"], fixed["state"], fixed["report"]["verdict"]) == ("c1", "active", "fix")
    assert "z" in parsed(run("ask", QUESTION, "--json"))["text"]
    assert [change["label"] for change in parsed(run("changes", "--json"))] == ["c1"]
    assert parsed(run("show", "c1", "--json"))["report"] == fixed["report"]
    assert parsed(run("strength", "c1", "0.5", "--json"))["strength"] == 0.5
    assert parsed(run("off", "c1", "--json"))["state"] == "off"
    assert parsed(run("on", "c1", "--json"))["state"] == "active"
    assert parsed(run("undo", "--json"))["state"] == "undone"
    assert parsed(run("changes", "--json"))[0]["state"] == "undone"


def test_the_report_for_people_fits_80_columns_and_says_the_same(run: Run) -> None:
    shown = run("fix", QUESTION, "z").stdout
    for word in ("c1", "active", "before", "after", "guard", "within budget", "seconds", "lm_head.weight"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "c1" in run("changes").stdout
    assert "before" in run("show", "c1").stdout


def test_bad_and_good_judge_the_last_reply_or_the_one_that_is_named(run: Run) -> None:
    run("ask", QUESTION)
    run("ask", OTHER)
    good = parsed(run("good", "--reply", "r1", "--json"))
    assert good["report"]["question"] == QUESTION
    assert [each["label"] for each in parsed(run("protected", "--json"))] == ["p1"]
    assert "p1" in run("protected").stdout
    assert "p1" in run("undo", "p1").stdout
    assert parsed(run("protected", "--json")) == []
    bad = parsed(run("bad", "--reason", "odd", "--force", "--json"))
    assert (bad["report"]["question"], bad["report"]["reason"]) == (OTHER, "odd")


def test_fix_takes_a_reply_by_its_id(run: Run) -> None:
    run("ask", QUESTION)
    assert parsed(run("fix", "--reply", "r1", "z", "--json"))["wanted"] == "z"


def test_a_preview_commits_nothing(run: Run) -> None:
    assert parsed(run("fix", QUESTION, "z", "--preview", "--json"))["state"] == "preview"
    assert parsed(run("changes", "--json")) == []


def test_the_guard_s_refusal_is_exit_code_3_with_the_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEWEIGHT_GUARD__MAX_MEAN_KL", "0.0001")
    error = told(run("fix", QUESTION, "z", "--json", code=3))
    assert error["code"] == "guard_refused"
    assert error["report"]["guard"]["reasons"]
    assert "would change too much else" in run("fix", QUESTION, "z", code=3).stderr
    assert parsed(run("fix", QUESTION, "z", "--force", "--json"))["forced"] is True


def test_why_shows_neurons_as_a_table_and_as_json(run: Run) -> None:
    found = parsed(run("why", QUESTION, "--top", "3", "--json"))
    assert found["reply"] == "r1"
    assert len(found["pushed"]) <= 3
    assert "pushed it" in run("why").stdout


def test_why_shows_parts_at_every_token_with_a_picture(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "map"
    other = QUESTION.replace("zed", "bed")
    words = ["why", QUESTION, "--against", "q", "--corrupted", other, "--top", "3"]
    found = parsed(run(*words, "--sites", "heads", "--by", "patching", "--picture", str(picture), "--json"))
    assert (found["by"], found["sites"], found["corrupted"]) == ("patching", "heads", other)
    assert found["tried"] > 0 and len(found["values"]) == 4 and len(found["values"][0][0]) == len(found["tokens"])
    assert found["pictures"][0] == f"{picture}.html" and picture.with_suffix(".html").is_file()
    for flags in (["--sites", "neurons"], ["--by", "direct"], ["--corrupted", other], []):
        shown = run("why", *flags, "--top", "3").stdout
        assert ("nats" in shown) and ("did to" in shown) == bool(flags)
        assert max(map(len, shown.splitlines())) <= 80
    assert parsed(run("why", "--sites", "resid", "--json"))["by"] == "relp"


def test_why_refuses_parts_and_prompts_that_cannot_be(run: Run) -> None:
    run("ask", QUESTION)
    assert "none of" in told(run("why", "--by", "magic", "--json", code=2))["message"]
    assert "none of" in told(run("why", "--sites", "layers", "--json", code=2))["message"]
    error = told(run("why", "--corrupted", "who?", "--json", code=2))
    assert "tokens" in error["message"] and error["hint"]
    assert "is empty" in told(run("why", "--corrupted", " ", "--json", code=2))["message"]


def test_step_stops_edits_and_tells_the_next_token_before_and_after(run: Run, tmp_path: Path) -> None:
    vector = tmp_path / "vector.json"
    vector.write_text(json.dumps([1.0] * 24))
    edits = [
        "--set",
        "layers.0.resid@2,3=2.5",
        "--scale",
        "layers.1.resid@*,*=0.5",
        "--add",
        f"layers.1.resid@-1,*={vector}",
    ]
    found = parsed(run("step", QUESTION, "--break", "layers.1.resid", *edits, "--answer", "2", "--json"))
    assert [stop["site"] for stop in found["stops"]] == ["layers.0.resid", "layers.1.resid"]
    assert [edit["did"].split()[0] for edit in found["edits"]] == ["set", "scaled", "a"]
    assert found["next"]["kl"] > 0 and set(found["answer"]) == {"before", "after"}
    assert found["change"] is None
    shown = run("step", QUESTION, "--break", "layers.1.resid", "--look", "--position", "-1").stdout
    assert "logit lens" in shown and "next token" in shown and "with the edits" not in shown


def test_what_was_done_in_a_step_can_be_kept_and_undone(run: Run) -> None:
    words = ["step", QUESTION, "--break", "layers.1.resid", "--set", "*,0=30", "--keep", "--name", "louder", "--json"]
    kept = parsed(run(*words))["change"]
    assert (kept["label"], kept["state"], kept["method"], kept["name"]) == ("c1", "active", "step", "louder")
    after = parsed(run("step", QUESTION, "--json"))["next"]["before"]
    assert after == parsed(run("step", QUESTION, "--json"))["next"]["after"]
    assert parsed(run("undo", "--json"))["state"] == "undone"
    assert parsed(run("step", QUESTION, "--json"))["next"]["before"] != after


def test_a_stepped_run_takes_commands_from_a_pipe_and_goes_on_after_an_error(run: Run) -> None:
    lines = ["n", "look", "lens -1", "set 1,2=3", "scale layers.1.mlp.neurons@*,4=0.5", "clamp 3=1", "edits", "undo"]
    lines += [
        "until layers.0.resid",
        "set nothing",
        "dance",
        "lens x",
        "go",
        "answer 2",
        "keep quiet",
        "restart",
        "sites resid",
    ]
    result = run("step", QUESTION, "--break", "layers.0.attn.heads", given="\n".join([*lines, "help", "q", "n"]) + "\n")
    for word in (
        "layers.0.attn.heads",
        "logit lens",
        "set to 3",
        "scaled by 0.5",
        "taken back",
        "with the edits",
        "c1",
    ):
        assert word in result.stdout, word
    for word in ("is behind it", "is no edit", "no command 'dance'", "not a whole number"):
        assert word in result.stderr, word


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "1,2=3"],
        ["--break", "embed", "--break", "final.resid", "--set", "1,2=3"],
        ["--break", "embed", "--set", "1=3"],
        ["--break", "embed", "--add", "1,2=no/such.json"],
        ["--break", "nowhere"],
    ],
)
def test_a_step_that_cannot_be_carried_out_is_wrong_usage(run: Run, words: list[str]) -> None:
    assert told(run("step", QUESTION, *words, "--json", code=2))["hint"]


def test_contrast_shows_its_table_first_and_commits_only_when_told(run: Run, tmp_path: Path) -> None:
    a, b = tmp_path / "ones.txt", tmp_path / "others.jsonl"
    a.write_text("\n".join(f"say {letter}" for letter in "abcdefgh") + "\n", encoding="utf-8")
    lines = [{"prompt": f"tell {letter}", "answer": letter} for letter in "abcdefgh"]
    b.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = parsed(run("contrast", str(a), str(b), "--top", "3", "--picture", str(tmp_path / "volcano"), "--json"))
    assert found["contrast"]["names"] == ["ones", "others"]
    assert found["contrast"]["prompts"] == [8, 8]
    assert found["change"] is None
    assert (tmp_path / "volcano.html").is_file()
    shown = run("contrast", str(a), str(b), "--completion").stdout
    assert "ones (8) against others (8)" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert parsed(run("changes", "--json")) == []
    # A random model gives none of the answers in the file, which is said below the table.
    failed = run("contrast", str(a), str(b), "--keep", code=2)
    assert "ones (8) against others (8)" in failed.stdout
    assert "none of others's answers" in failed.stderr


def test_contrast_says_which_line_of_a_file_it_does_not_understand(run: Run, tmp_path: Path) -> None:
    good, broken = tmp_path / "good.txt", tmp_path / "broken.jsonl"
    good.write_text("a\nb\n", encoding="utf-8")
    broken.write_text('{"prompt": "a"}\n{"question": "b"}\n', encoding="utf-8")
    assert "Line 2" in told(run("contrast", str(good), str(broken), "--json", code=2))["message"]
    assert "2 prompts" in told(run("contrast", str(good), str(good), "--json", code=2))["message"]
    assert told(run("contrast", str(good), "--json", code=2))["code"] == "usage"
    assert "0 prompts" in told(run("contrast", "--feedback", "--json", code=2))["message"]


def test_neurons_are_labelled_once_searched_and_compared(run: Run, tmp_path: Path) -> None:
    assert "80 of 80 neurons" in run("neurons").stdout
    hits = parsed(run("--json", "neurons", "--token", "a", "--top", "3"))
    assert len(hits["hits"]) == 3 <= hits["found"]
    assert all(hit["token"] == "a" for hit in hits["hits"])
    one = parsed(run("--json", "neurons", "--find", "b", "--layer", "1", "--side", "promotes", "--top", "500"))
    assert {(hit["layer"], hit["side"]) for hit in one["hits"]} == {(1, "promotes")}
    same = parsed(run("--json", "neurons", "--compare", parsed(run("--json", "models"))["known"][0]["source"]))
    assert same["kept"] == {"promotes": 1.0, "suppresses": 1.0, "gate": 1.0, "up": 1.0}
    assert "a match of '[0-9]'" in run("neurons", "--regex", "[0-9]", "--layers", "0-1").stdout


def test_one_neuron_has_a_page(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what is the capital of austria? it is vienna, said the man from the north.\n" * 4)
    page = parsed(run("--json", "neuron", "1:11", "--text", str(text), "--picture", str(tmp_path / "curve")))
    assert (page["label"]["layer"], page["label"]["neuron"]) == (1, 11)
    assert page["strongest"] and len(page["curve"]["points"]) == 10
    assert (tmp_path / "curve.html").exists()
    shown = run("neuron", "1:11", "--text", str(text)).stdout
    assert "Neuron 1:11" in shown and max(map(len, shown.splitlines())) <= 80


def test_a_clamp_shows_both_answers_and_is_kept_when_told(run: Run) -> None:
    found = parsed(run("--json", "clamp", "1:4=30", "0:7=-9", "--prompt", QUESTION))
    assert [(each["layer"], each["neuron"], each["value"]) for each in found["neurons"]] == [(1, 4, 30.0), (0, 7, -9.0)]
    assert found["next"]["kl"] > 0 and found["change"] is None
    assert parsed(run("--json", "changes")) == []
    kept = parsed(run("--json", "clamp", "1:4=30", "--prompt", QUESTION, "--keep", "--force", "--name", "held"))
    assert (kept["change"]["state"], kept["change"]["method"]) == ("active", "clamp")
    run("undo")
    assert "1:4" in run("clamp", "1:4=30", "--prompt", "what is", "--raw").stdout


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["neuron", "20-1114"], "invalid_input"),
        (["neuron", "0:40"], "unknown_site"),
        (["neuron", "7:0"], "unknown_site"),
        (["neuron", "0:1", "--text", "/nowhere.txt"], "invalid_input"),
        (["neurons", "--layers", "3-1"], "invalid_input"),
        (["neurons", "--layers", "0-9"], "unknown_site"),
        (["neurons", "--find", " "], "invalid_input"),
        (["neurons", "--find", "notatoken"], "invalid_input"),
        (["neurons", "--regex", "["], "invalid_input"),
        (["neurons", "--merge", "/nowhere.sqlite"], "invalid_input"),
        (["clamp", "1:4", "--prompt", "what"], "invalid_input"),
        (["clamp", "1:4=much", "--prompt", "what"], "invalid_input"),
        (["clamp", "1:4=1", "1:4=2", "--prompt", "what"], "invalid_input"),
        (["clamp", "1:40=1", "--prompt", "what"], "unknown_site"),
        (["clamp", "1:4=1", "--prompt", " "], "invalid_input"),
    ],
)
def test_neurons_that_are_not_there_are_named(run: Run, words: list[str], name: str) -> None:
    assert told(run("--json", *words, code=2))["code"] == name


def test_models_super_weights_and_doctor_say_what_there_is(run: Run) -> None:
    run("ask", QUESTION)
    assert parsed(run("models", "--json"))["known"][0]["architecture"] == "llama"
    assert "llama" in run("models").stdout
    assert "weights" in parsed(run("super-weights", "--json"))
    found = parsed(run("doctor", "--json"))
    assert found["problems"] == "none"
    assert found["device"] == "cpu"
    assert list(found["one change"]) == ["a neuron's column", "rank one", "a whole matrix", "4 spare neurons"]
    for cost in found["one change"].values():
        assert cost["apply_ms"] > 0 and cost["apply_bytes"] > cost["undo_bytes"] > 0
    assert "one change" in run("doctor").stdout


@pytest.mark.parametrize("words", [["fix"], ["strength", "c1"], ["ask", "x", "--temperature", "-1"], ["dance"]])
def test_wrong_usage_is_exit_code_2_also_as_json(run: Run, words: list[str]) -> None:
    run(*words, code=2)
    assert told(run(*words, "--json", code=2))["code"] == "usage"


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (["undo", "c9"], 2, "unknown_change"),
        (["show", "c9"], 2, "unknown_change"),
        (["good"], 2, "unknown_reply"),
        (["fix", QUESTION, " "], 2, "invalid_input"),
        (["fix", QUESTION, "z", "--method", "magic"], 2, "unknown_method"),
        (["fix", QUESTION, "q"], 1, "no_mend_found"),
        (["undo"], 1, "state_conflict"),
        (["ask", "x", "--model", "no/such/folder"], 1, "model_not_found"),
        (["ask", "x", "--device", "toaster"], 2, "invalid_input"),
    ],
)
def test_an_error_has_its_exit_code_and_its_name(run: Run, words: list[str], code: int, name: str) -> None:
    error = told(run(*words, "--json", code=code))
    assert error["code"] == name
    assert error["message"] and error["hint"]
    plain = run(*words, code=code)
    assert plain.stdout == ""
    assert "Traceback" not in plain.stderr


def test_options_may_stand_before_the_verb(run: Run, tmp_path: Path) -> None:
    found = parsed(run("--json", "--workspace", str(tmp_path / "else"), "ask", QUESTION))
    assert found["label"] == "r1"
    assert (tmp_path / "else" / "ledger.sqlite3").is_file()


def test_a_chat_with_its_slash_commands(run: Run, tmp_path: Path) -> None:
    lines = [
        "/fix z",  # there is no reply yet
        QUESTION,
        "/why",
        "/step",
        "n",
        "lens",
        "quit",
        "/fix z",
        QUESTION,
        "/changes",
        "/strength c1 0.5",
        "/strength c1 much",
        "/off c1",
        "/on c1",
        "/show c1",
        "/undo",
        "/undo",
        "/history",
        "/dance",
        "/help",
        "/new",
        OTHER,
        "/good",
        "/bad too odd",
        "/quit",
        "never read",
    ]
    result = run("chat", given="\n".join(lines) + "\n")
    for word in ("There is no reply", "is not a strength", "nothing to undo", "no command /dance"):
        assert word in result.stderr, word
    for word in ("pushed it", "logit lens", "c1 active", "c1 off", "c1 undone", "/strength ID X", "user: " + QUESTION):
        assert word in result.stdout, word
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        assert [each.verdict for each in live.feedback()] == ["fix", "good", "bad"]


def test_a_chat_for_programs_gives_a_reply_a_line(run: Run) -> None:
    result = run("chat", "--json", given=f"{QUESTION}\n{OTHER}\n")
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert [reply["label"] for reply in replies] == ["r1", "r2"]
    assert len(replies[1]["messages"]) == 3


def test_a_chat_for_programs_tells_what_commands_do_a_line_each(run: Run) -> None:
    lines = [QUESTION, "/why", "/fix z", "/changes", "/off c1", "/history", "/step", "/help", "/new", "/quit"]
    result = run("chat", "--json", given="\n".join(lines) + "\n")
    reply, why, fixed, changes, off, history, commands, new = (json.loads(line) for line in result.stdout.splitlines())
    assert (reply["label"], why["reply"], fixed["label"], fixed["state"]) == ("r1", "r1", "c1", "active")
    assert [change["label"] for change in changes] == ["c1"]
    assert (off["label"], off["state"]) == ("c1", "off")
    assert history[-2:] == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": reply["text"]}]
    assert "/undo [ID]" in commands and new == {"chat": "new"}
    assert "/step is a conversation" in result.stderr


def test_the_demo_ends_with_the_weights_it_began_with(run: Run, tmp_path: Path) -> None:
    found = parsed(run("demo", "--question", QUESTION, "--answer", "z", "--json"))
    assert found["restored"] is True
    assert found["sha256"]["before"] == found["sha256"]["undone"] != found["sha256"]["changed"]
    assert "bit for bit" in run("demo", "--question", QUESTION, "--answer", "z").stdout
    assert not (tmp_path / "workspace").exists()
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        assert fingerprint(live) == found["sha256"]["before"]


def test_ctrl_c_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveModel, "load", interrupt)
    assert "Interrupted" in run("ask", QUESTION, code=130).stderr


def test_steer_finds_shows_saves_loads_and_keeps(run: Run, tmp_path: Path) -> None:
    saved, picture = tmp_path / "saved", tmp_path / "curve"
    flags = ["--kl", "0.05", "--measure", "mean", "--prompt", QUESTION, "--save", str(saved), "--json"]
    found = parsed(run("steer", "a - c", "--picture", str(picture), *flags))
    assert found["steering"]["reached"] == pytest.approx(0.05, rel=0.1)
    assert len(found["steering"]["curve"]) >= 4 and found["steering"]["layers"]
    assert set(found["answers"]) == {"prompt", "without", "with"}
    assert found["pictures"][0] == f"{picture}.html" and picture.with_suffix(".html").is_file()
    assert "change" not in found and parsed(run("changes", "--json")) == []
    kept = parsed(run("steer", "--load", str(saved), "--prompt", QUESTION, "--keep", "--json"))
    assert (kept["steering"], kept["change"]["state"]) == (None, "active")
    assert kept["answers"]["with"] == found["answers"]["with"]
    assert parsed(run("undo", "--json"))["state"] == "undone"


def test_steer_tells_people_the_curve_in_80_columns(run: Run, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    sides = [{"prompt": QUESTION, "answer": letter} for letter in "ac"]
    pairs.write_text(json.dumps({"positive": sides[0], "negative": sides[1]}), encoding="utf-8")
    flags = ["--pairs", str(pairs), "--how", "tuned", "--layer", "1", "--kl", "0.05"]
    shown = run("steer", *flags, "--prompt", QUESTION, "--preview").stdout
    for word in ("pairs", "layer", "the curve", "chosen", "without", "with", "preview", "guard"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_steer_refuses_what_does_not_go_together(run: Run, tmp_path: Path) -> None:
    for words, said in (
        ([], "one of"),
        (["a - b", "--load", "x"], "one of"),
        (["--toward", "x"], "both"),
        (["a - b", "--how", "magic"], "none of"),
        (["a - b", "--measure", "max"], "none of"),
        (["a - b", "--force"], "--keep"),
        (["--load", "x", "--picture", "y"], "no curve"),
    ):
        assert said in told(run("steer", *words, "--json", code=2))["message"]
    assert "two sides" in told(run("steer", "love", "--json", code=2))["message"]
    assert "can be read" in told(run("steer", "--load", str(tmp_path / "none"), "--json", code=2))["message"]


def test_massive_reads_a_question_or_a_file_and_draws_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 3)
    found = parsed(run("massive", "--text", str(tmp_path / "text.txt"), "--picture", str(tmp_path / "m"), "--json"))
    assert found["tokens"] == 72 and found["values"] == []
    assert found["pictures"][0] == str(tmp_path / "m.html") and (tmp_path / "m.html").is_file()
    assert parsed(run("massive", QUESTION, "--raw", "--json"))["tokens"] == len(QUESTION)
    shown = run("massive", QUESTION).stdout
    assert "None. The nearest is" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_sparsity_tells_each_layer_and_each_rule_in_80_columns(run: Run, tmp_path: Path) -> None:
    found = parsed(run("sparsity", "--tokens", "64", "--percent", "2", "--picture", str(tmp_path / "s"), "--json"))
    assert [each["layer"] for each in found["layers"]] == [0, 1]
    assert [each["rule"] for each in found["rules"]] == ["relative", "threshold", "top-k"]
    assert (tmp_path / "s.html").is_file()
    shown = run("sparsity", "--tokens", "64", "--no-layers").stdout
    assert shown.startswith("PPL-1% sparsity") and max(map(len, shown.splitlines())) <= 80


def test_quantize_measures_writes_keeps_and_is_undone(run: Run, tmp_path: Path) -> None:
    words = ("quantize", "--bits", "3", "--block", "8", "--tokens", "64", "--json")
    before = parsed(run("ask", QUESTION, "--json"))["version_hash"]
    only = parsed(run(*words))
    assert set(only) == {"quantization"} and parsed(run("changes", "--json")) == []
    kept = parsed(run(*words, "--keep", "--force", "--export", str(tmp_path / "out")))
    assert kept["quantization"]["rows"][0]["perplexity"] == only["quantization"]["rows"][0]["perplexity"]
    assert (kept["change"]["state"], kept["change"]["method"]) == ("active", "quantize")
    assert (tmp_path / "out" / "model.safetensors").is_file() and kept["exported"] == str(tmp_path / "out")
    assert parsed(run("ask", QUESTION, "--json"))["version_hash"] != before
    assert parsed(run("strength", "c1", "0.5", "--json"))["strength"] == 0.5
    run("undo", "--json")
    assert parsed(run("ask", QUESTION, "--json"))["version_hash"] == before
    assert told(run(*words, "--export", str(tmp_path / "out"), code=2))["message"].endswith("is not empty.")
    shown = run("quantize", "--bits", "8", "--block", "1x8", "--tokens", "64", "--preview").stdout
    assert "8 bits in blocks of 1x8" in shown and max(map(len, shown.splitlines())) <= 80


def test_a_super_weight_s_report_needs_a_super_weight(run: Run, tmp_path: Path) -> None:
    assert told(run("super-weights", "--report", "--json", code=1))["code"] == "unsupported"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["massive"], "prompt"),
        (["massive", "a", "--text", "x"], "prompt"),
        (["massive", "--text", "x", "--raw"], "--raw"),
        (["massive", "--text", "nowhere.txt"], "cannot be read"),
        (["sparsity", "--percent", "0"], "cannot rise"),
        (["quantize", "--bits", "9"], "equal to 8"),
        (["quantize", "--block", "x"], "block"),
        (["quantize", "--force"], "--keep"),
        (["quantize", "--keep", "--preview"], "not both"),
        (["steer", "a - b", "--keep", "--preview"], "not both"),
        (["features", "1", "--steer", "1", "--keep", "--preview"], "not both"),
        (["diff", "a", "b", "--keep", "--preview"], "not both"),
        (["clamp", "1:2=3", "--raw", "--prompt", "a"], "one token"),
        (["quantize", "--clip-z", "3", "--clip-percentile", "99"], "not both"),
        (["quantize", "--keep-super-activations"], "--activations"),
        (["super-weights", "--data", "x"], "--report"),
    ],
)
def test_wrong_usage_of_the_reading_verbs_is_said(run: Run, words: list[str], says: str) -> None:
    assert says in told(run(*words, "--json", code=2))["message"]


FEW_FEATURES = ["features", "--layer", "1", "--k", "4", "--share", "0.2", "--tokens", "300", "--rounds", "5"]


def test_features_are_listed_shown_by_number_steered_with_and_kept(run: Run, tmp_path: Path) -> None:
    text, picture, saved = tmp_path / "text.txt", tmp_path / "map", tmp_path / "saved"
    text.write_text("the cat sat on the mat. the dog lay by the door, and it rained all day. " * 9, "utf-8")
    assert "no features" in told(run("features", "2", "--json", code=2))["message"]
    found = parsed(run(*FEW_FEATURES, "--text", str(text), "--picture", str(picture), "--json"))
    assert [each["number"] for each in found["list"]] == [0, 1, 2, 3]
    assert found["features"]["settings"]["text"] == "text.txt" and found["features"]["errors"][-1] < 1
    assert picture.with_suffix(".html").is_file()
    one = parsed(run("features", "2", "--json"))
    assert one["feature"]["contexts"] == found["list"][2]["contexts"]
    assert all(each["label"] for each in one["feature"]["neurons"])
    flags = ["--kl", "0.05", "--measure", "mean", "--prompt", QUESTION, "--json"]
    steered = parsed(run("features", "2", "--steer", "1", "--save", str(saved), "--keep", *flags))
    assert steered["steering"]["reached"] == pytest.approx(0.05, rel=0.1)
    assert steered["change"]["state"] == "active" and (saved / "adjustment.json").is_file()
    assert parsed(run("undo", "--json"))["state"] == "undone"
    less = parsed(run("features", "2", "--steer", "-1", "--preview", *flags))
    assert less["steering"]["factor"] == steered["steering"]["factor"]
    assert less["change"]["state"] == "preview"


def test_features_for_people_fit_80_columns(run: Run) -> None:
    listed = run(*FEW_FEATURES).stdout
    shown = run("features", "0", "--steer", "1", "--kl", "0.05", "--prompt", QUESTION).stdout
    for word, where in (("error", listed), ("energy", listed), ("neuron", shown), ("effect", shown), ("with", shown)):
        assert word in where
    assert max(map(len, (listed + shown).splitlines())) <= 80


def test_features_refuse_what_does_not_go_together(run: Run, tmp_path: Path) -> None:
    for words, said in (
        (["--steer", "1"], "which feature"),
        (["1", "--steer", "0"], "changes nothing"),
        (["1", "--keep"], "--steer"),
        (["1", "--steer", "1", "--force"], "--keep"),
        (["--measure", "max"], "none of"),
        (["--layer", "9"], "layer 9"),
        (["--text", str(tmp_path / "none")], "cannot be read"),
    ):
        assert said in told(run("features", *words, "--json", code=2))["message"]
    run(*FEW_FEATURES)
    assert "no feature 4" in told(run("features", "4", "--json", code=2))["message"]


def test_diff_shows_saves_and_commits_what_another_model_has_otherwise(run: Run, tmp_path: Path) -> None:
    one, other, saved = str(tmp_path / "model"), save_tiny_model(tmp_path / "other", seed=1), tmp_path / "saved"
    words = ["diff", one, str(other), "--picture", str(tmp_path / "bars"), "--save", str(saved)]
    found = parsed(run(*words, "--json"))
    assert found["diff"]["changes"] and found["diff"]["labels"] and found["diff"]["moved"]
    assert (saved / "adjustment.json").is_file() and (tmp_path / "bars.html").is_file()
    assert parsed(run("changes", "--json")) == []
    other_says = parsed(run("ask", QUESTION, "--model", str(other), "--workspace", str(tmp_path / "b"), "--json"))
    kept = parsed(run("diff", one, str(other), "--no-labels", "--prompt", QUESTION, "--keep", "--force", "--json"))
    assert (kept["change"]["state"], kept["change"]["method"]) == ("active", "diff")
    assert parsed(run("ask", QUESTION, "--json"))["text"] == other_says["text"]
    assert parsed(run("undo", "--json"))["state"] == "undone"
    shown = run("diff", one, str(other)).stdout
    for word in ("weights", "most changed", "keep their token", "wrote"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_diff_refuses_what_cannot_be(run: Run, tmp_path: Path) -> None:
    one = str(tmp_path / "model")
    for words, said in (
        ([one, one, "--force"], "--keep"),
        ([one, one, "--low-rank", "2"], "--save"),
        ([one, one, "--prompt", "x"], "--keep"),
        ([one, one, "--save", "x"], "the same"),
        ([one, str(tmp_path / "none")], "no model"),
    ):
        code = 1 if said == "no model" else 2
        assert said in told(run("diff", *words, "--json", code=code))["message"]
    assert "are the same" in " ".join(run("diff", one, one).stdout.split())


def test_the_demo_leaves_the_ledger_of_the_environment_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real.sqlite3"
    monkeypatch.setenv("LIVEWEIGHT_DATABASE_URL", f"sqlite:///{real}")
    assert parsed(run("demo", "--question", QUESTION, "--answer", "z", "--json"))["restored"]
    assert not real.exists()


@pytest.mark.parametrize(("words", "says"), [(["--threads", "0"], "threads"), (["--model", ""], "model")])
def test_an_option_that_is_given_and_empty_is_not_left_out(run: Run, words: list[str], says: str) -> None:
    assert says in told(run("ask", QUESTION, *words, "--json", code=2))["message"]


def test_changes_are_those_of_the_model_however_its_folder_is_written(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run("fix", QUESTION, "z", "--model", f"{model}/")
    for name in (str(model), f"{model}/.", f"{model}/../model"):
        assert [change["label"] for change in parsed(run("changes", "--model", name, "--json"))] == ["c1"]
    assert "has not been used in this workspace" in run("changes", "--model", "smollm2").stderr


def test_a_number_that_json_lacks_is_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"ratio": float("nan"), "kl": float("inf"), "path": Path("a")})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found == {"ratio": "NaN", "kl": "Infinity", "path": "a"}


def test_a_question_is_shown_as_it_is_asked() -> None:
    shown = Console(width=60, file=io.StringIO())
    shown.print(_side_by_side("What does [/INST] in a[i] mean?", "x", "y"))
    assert "[/INST] in a[i]" in " ".join(shown.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('\ufeff{"prompt": "a\\u2028b"}\n{"prompt": "c", "answer": "d"}', ["a\u2028b", ("c", "d")]),
        ('{"prompt": "a\u2028b"}\r\n', ["a\u2028b"]),
        ("a \n\n  b\r\n", ["a ", "  b"]),
    ],
)
def test_a_file_of_prompts_is_read_as_it_was_meant(text: str, found: list[object], tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text(text, encoding="utf-8")
    assert read_prompts(file) == found


@pytest.mark.parametrize("line", ["what?", '"what?"', "[1]"])
def test_a_line_that_is_no_record_among_records_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "a"}\n' + line, encoding="utf-8")
    with pytest.raises(InvalidInput, match="Line 2"):
        read_prompts(file)


def test_what_is_said_after_an_interrupted_reply_is_said_of_that_reply(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = Generation.draw, []

    def interrupt(self: Generation, *given: Any, **more: Any) -> Any:
        drawn.append(self.prompt_length)
        if len(set(drawn)) == 2 and drawn.count(self.prompt_length) == 3:
            raise KeyboardInterrupt
        return draw(self, *given, **more)

    monkeypatch.setattr(Generation, "draw", interrupt)
    shown = run("chat", given=f"{QUESTION}\n{OTHER}\n/fix z\n/quit\n")
    assert "Interrupted" in shown.stderr
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        assert [(each.reply, each.verdict) for each in live.feedback()] == [(2, "fix")]
        assert live.changes()[0].question == OTHER


def test_learning_says_with_its_exit_code_that_something_was_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "feedback.jsonl"
    file.write_text(json.dumps({"prompt": QUESTION, "correction": "z"}), encoding="utf-8")
    monkeypatch.setenv("LIVEWEIGHT_GUARD__MAX_WORST_KL", "0")
    assert [item["outcome"] for item in parsed(run("learn", str(file), "--json", code=3))["items"]] == ["refused"]
    monkeypatch.delenv("LIVEWEIGHT_GUARD__MAX_WORST_KL")
    file.write_text(json.dumps({"prompt": QUESTION, "correction": "q"}), encoding="utf-8")
    assert [item["outcome"] for item in parsed(run("learn", str(file), "--json", code=1))["items"]] == ["failed"]


def test_a_steering_that_the_guard_refuses_is_told_all_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEWEIGHT_GUARD__MAX_WORST_KL", "0")
    refused = run("steer", "a - c", "--kl", "0.05", "--keep", "--json", code=3)
    assert json.loads(refused.stdout)["steering"]["curve"]


def test_bytes_that_are_no_text_are_refused_by_name(run: Run) -> None:
    assert "half of a character" in run("ask", "a \udcff b", code=2).stderr
