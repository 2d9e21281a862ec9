"""`localv4 run` with the built-in model, in real processes."""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from terminal import Terminal, needs_jit, needs_pty, run_here, run_localv4, start_localv4

from localv4.cli import inputs
from localv4.engine.memory import MemoryOptions, plan_memory, row_format
from localv4.library.installed import embedded_model_path
from localv4.paging.trace import read_trace
from localv4.planning.header_facts import facts_of_checkpoint
from localv4.storage import open_checkpoint

pytestmark = needs_jit

CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris.\n"
ENDLESS = ("run", "-q", "--raw", "Once", "--temp", "100", "--seed", "1")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather for a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def test_answer_on_stdout_and_notes_on_stderr(tmp_path: Path) -> None:
    done = run_localv4("run", CAPITAL, "--greedy", "--stats", home=tmp_path)
    assert done.returncode == 0
    assert done.stdout.decode() == PARIS
    note, *progress, stats = done.stderr.decode().splitlines()
    assert note.startswith("note: using tiny-v4, the small built-in demo model")
    assert all(line.endswith("%") for line in progress)
    names = [part.split()[0] for part in stats.split(" | ")]
    assert names == ["prompt", "gen", "peak"]


def test_experts_are_paged_within_a_budget(tmp_path: Path) -> None:
    with open_checkpoint(embedded_model_path()) as checkpoint:
        facts = facts_of_checkpoint("tiny-v4", "", checkpoint)
    memory = MemoryOptions()
    facts = replace(facts, rows=row_format(memory))
    plan = plan_memory(facts, memory, None, 2)
    budget = plan.total - plan.expert_bytes + int(0.7 * plan.all_experts)
    trace = tmp_path / "routes"
    options = ("-t", "2", "--ram", str(budget), "--io", "direct", "--stats")
    options += ("--trace-routes", str(trace))
    done = run_here("run", "-m", "tiny-v4", "--greedy", CAPITAL, *options, home=tmp_path)
    assert (done.code, done.stdout) == (0, PARIS)
    assert "misses per token" in done.stderr and "waited" in done.stderr
    assert read_trace(trace).chosen.shape[1:] == (8, 4)


def test_too_little_memory_is_told_with_a_remedy(tmp_path: Path) -> None:
    done = run_here("run", "-m", "tiny-v4", "--ram", "100MiB", CAPITAL, home=tmp_path)
    assert (done.code, done.stdout) == (4, "")
    assert done.stderr.startswith("error: tiny-v4 needs at least ") and "--ram " in done.stderr


def test_quiet_says_nothing_else(tmp_path: Path) -> None:
    done = run_here("run", "-q", "--stats", "-m", "tiny-v4", "--greedy", CAPITAL, home=tmp_path)
    assert (done.code, done.stdout, done.stderr) == (0, PARIS, "")


def test_prompt_from_file_and_stdin(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("My name is Anna.\n")
    done = run_here(
        "run", "--greedy", "-q", "--json", "-f", str(file), home=tmp_path, stdin=f"{CAPITAL}\n"
    )
    both = run_here(
        "run", "--greedy", "-q", "--json", f"My name is Anna.\n\n{CAPITAL}", home=tmp_path
    )
    drop = {"timings": None}
    assert json.loads(done.stdout) | drop == json.loads(both.stdout) | drop


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (f"{CAPITAL}\n".encode(), 0, ""),
        (b"\xff\xfe" + CAPITAL.encode("utf-16-le"), 0, ""),
        (b"\xff" + CAPITAL.encode(), 0, "warning: stdin is not valid UTF-8"),
        (b"\x89PNG\0\0", 2, "error: stdin holds NUL bytes"),
        (b"", 2, "error: there is no prompt"),
        (b"a" * (inputs.MAX_PROMPT_BYTES + 1), 4, "error: stdin is larger than 32 MiB"),
    ],
)
def test_stdin(data: bytes, code: int, said: str, tmp_path: Path) -> None:
    done = run_localv4("run", "-q", "--greedy", home=tmp_path, stdin=data)
    assert done.returncode == code
    assert done.stderr.decode().startswith(said)
    assert (done.stdout != b"") is (code == 0)


def test_json(tmp_path: Path) -> None:
    done = run_here(
        "run", "--greedy", "--format", "json", "--think", "What is 148 + 276?", home=tmp_path
    )
    answer = json.loads(done.stdout)
    assert answer["model"] == "tiny-v4"
    assert answer["text"] == "148 + 276 = 424"
    assert answer["reasoning"].startswith("I need to add 148 and 276.")
    assert answer["tool_calls"] == []
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 16
    assert answer["usage"]["reused"] == 0
    assert answer["usage"]["completion_tokens"] > 10
    assert answer["timings"]["decode_s"] > 0


@pytest.mark.parametrize(
    ("more", "has_reasoning"),
    [([], False), (["--format", "human"], True), (["--format", "human", "--hide-thinking"], False)],
)
def test_reasoning_in_a_pipe(more: list[str], has_reasoning: bool, tmp_path: Path) -> None:
    done = run_here("run", "--greedy", "--think", "What is 148 + 276?", *more, home=tmp_path)
    assert done.stdout.endswith("148 + 276 = 424\n")
    assert ("thinking:\nI need to add" in done.stdout) is has_reasoning
    assert (done.stdout == "148 + 276 = 424\n") is not has_reasoning


def test_tools(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    arguments = ("run", "--greedy", "--tools", str(tools), "What is the weather in Paris?")
    plain = run_here(*arguments, home=tmp_path)
    assert plain.stdout == 'get_weather {"city": "Paris"}\n'
    answer = json.loads(run_here(*arguments, "--json", home=tmp_path).stdout)
    assert answer["finish_reason"] == "tool_calls"
    [call] = answer["tool_calls"]
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Paris"}


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"function": {}}]', "["])
def test_bad_tools(text: str, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(text)
    done = run_here("run", "--tools", str(tools), "x", home=tmp_path)
    assert done.code == 5
    assert "tools.json" in done.stderr


def test_raw_continues_the_text(tmp_path: Path) -> None:
    done = run_here(
        "run", "--raw", "--greedy", "-n", "4", "Once upon a time there was a little", home=tmp_path
    )
    assert done.stdout == " girl named Sarah.\n"


def test_limits_and_stop_strings(tmp_path: Path) -> None:
    cut = run_here("run", "--greedy", "--json", "-n", "3", CAPITAL, home=tmp_path)
    assert json.loads(cut.stdout)["finish_reason"] == "length"
    assert json.loads(cut.stdout)["usage"]["completion_tokens"] == 3
    stopped = run_here("run", "--greedy", "--stop", " is", "--stop", "x", CAPITAL, home=tmp_path)
    assert stopped.stdout == "The capital of France\n"


def test_not_streamed_is_the_same(tmp_path: Path) -> None:
    assert run_here("run", "--greedy", "--no-stream", CAPITAL, home=tmp_path).stdout == PARIS


def test_flags_beat_the_environment(tmp_path: Path) -> None:
    limit = {"LOCALV4_MAX_TOKENS": "2"}
    limited = run_here("run", "--greedy", CAPITAL, home=tmp_path, changes=limit)
    assert limited.stdout == "The capital\n"
    free = run_here("run", "--greedy", "-n", "40", CAPITAL, home=tmp_path, changes=limit)
    assert free.stdout == PARIS


@pytest.mark.parametrize(
    ("environment", "typed"),
    [
        ({"LOCALV4_THINK_EFFORT": "max"}, ["--no-think", "--greedy"]),
        ({"LOCALV4_FORMAT": "json"}, ["--format", "human", "--greedy"]),
        ({"LOCALV4_JSON": "1"}, ["--format", "human", "--greedy"]),
        ({"LOCALV4_TEMP": "2"}, ["--greedy"]),
        ({"LOCALV4_RAW": "1"}, ["--system", "", "--greedy"]),
    ],
)
def test_typed_options_beat_contradictions_in_the_environment(
    environment: dict[str, str], typed: list[str], tmp_path: Path
) -> None:
    done = run_here("run", "-q", *typed, CAPITAL, home=tmp_path, changes=environment)
    assert (done.code, done.stdout) == (0, PARIS)


def test_temperature_beats_greedy_in_the_environment(tmp_path: Path) -> None:
    arguments = ("run", "-q", "--temp", "50", "--seed", "1", CAPITAL, "-n", "8")
    done = run_here(*arguments, home=tmp_path, changes={"LOCALV4_GREEDY": "1"})
    assert done.code == 0
    assert done.stdout != PARIS


def test_raw_forgets_the_chat_settings_of_the_environment(tmp_path: Path) -> None:
    chat = {"LOCALV4_SYSTEM": "Be brief.", "LOCALV4_THINK": "1", "LOCALV4_THINK_EFFORT": "low"}
    done = run_here("run", "-q", "--raw", "-n", "2", "The", home=tmp_path, changes=chat)
    assert done.code == 0
    assert run_here("run", "--raw", "-s", "Be brief.", "The", home=tmp_path).code == 2


def test_note_only_when_nothing_was_chosen(tmp_path: Path) -> None:
    chosen = {"LOCALV4_MODEL": "tiny-v4"}
    done = run_here("run", "--greedy", CAPITAL, home=tmp_path, changes=chosen)
    assert "tiny-v4" not in done.stderr
    assert "tiny-v4" in run_here("run", "-m", "", "--greedy", CAPITAL, home=tmp_path).stderr


def test_bad_tools_are_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    done = run_here("run", "-m", "./missing", "--tools", "none.json", "x", home=tmp_path)
    assert "none.json" in done.stderr


def test_seed(tmp_path: Path) -> None:
    story = ("run", "--temp", "1.5", "-n", "20", "Tell me a short story about a fox.")
    first, second = (run_here(*story, "--seed", "5", home=tmp_path).stdout for _ in range(2))
    other = run_here(*story, "--seed", "6", home=tmp_path).stdout
    assert first == second != other


def test_other_spellings(tmp_path: Path) -> None:
    done = run_here(
        "run", "--temperature", "0", "--ctx", "100", "--nothink", CAPITAL, home=tmp_path
    )
    assert done.stdout == PARIS


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-c", "5", CAPITAL], 4, "5"),
        (["-c", "1000000000", CAPITAL], 4, "4096"),
        (["-c", "0", CAPITAL], 2, "--ctx-size"),
        (["-t", "0", CAPITAL], 2, "--threads"),
        (["-n", "0", CAPITAL], 2, "max-tokens"),
        ([""], 2, "no prompt"),
        (["-f", "missing.txt"], 1, "missing.txt"),
        (["-m", "./missing", CAPITAL], 1, "missing"),
    ],
)
def test_refusals(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = run_here("run", "-q", *arguments, home=tmp_path)
    assert done.code == code
    assert said in done.stderr.splitlines()[0]
    assert done.stdout == ""


def test_context_of_exactly_the_prompt_and_one(tmp_path: Path) -> None:
    done = run_here("run", "--greedy", "--json", "-c", "12", CAPITAL, home=tmp_path)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 1
    assert run_here("run", "--greedy", "-c", "11", CAPITAL, home=tmp_path).code == 4


def test_damaged_generation_config(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder)
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    done = run_here("run", "-m", str(folder), CAPITAL, home=tmp_path)
    assert done.code == 5
    assert "generation_config.json" in done.stderr


def test_streams_into_a_closed_pipe(tmp_path: Path) -> None:
    process = start_localv4(*ENDLESS, home=tmp_path)
    assert process.stdout is not None
    assert process.stdout.read(1)  # it streams: there is a first character long before the end
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert said == b""
    assert process.returncode in (0, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals for processes")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["interrupt", "end"]
)
def test_signals_keep_what_there_is(number: int, code: int, tmp_path: Path) -> None:
    process = start_localv4(*ENDLESS, home=tmp_path)
    assert process.stdout is not None
    first = process.stdout.read(20)
    start = time.monotonic()
    process.send_signal(number)
    rest, said = process.communicate(timeout=60)
    assert time.monotonic() - start < 10  # measured: 0.02 s
    assert process.returncode == code
    assert len(first + rest) >= 20
    assert said == b""
    if number == signal.SIGINT:
        assert rest.endswith(b"\n")


@needs_pty
def test_on_a_terminal(tmp_path: Path) -> None:
    with Terminal("run", "-m", "tiny-v4", "--greedy", CAPITAL, home=tmp_path) as screen:
        assert screen.wait() == 0
        assert "The capital of France is Paris." in screen.text
        assert screen.written.rstrip().endswith("\x1b[?25h")  # the cursor is visible again


@needs_pty
@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_plain_terminals(name: str, value: str, tmp_path: Path) -> None:
    arguments = ("run", "-q", "--greedy", "--think", "What is 148 + 276?")
    with Terminal(*arguments, home=tmp_path, changes={name: value}) as screen:
        assert screen.wait() == 0
        assert "I need to add 148 and 276." in screen.text
        assert "148 + 276 = 424" in screen.text
        if name == "NO_COLOR":
            assert not any(f"\x1b[{code}m" in screen.written for code in range(30, 38))
        else:
            assert "\x1b" not in screen.written


@needs_pty
def test_one_column(tmp_path: Path) -> None:
    with Terminal("run", "--greedy", CAPITAL, home=tmp_path, columns=1) as screen:
        assert screen.wait() == 0
        assert "Traceback" not in screen.text


@needs_pty
def test_interrupt_on_a_terminal(tmp_path: Path) -> None:
    with Terminal(
        "run", "--temp", "100", "--seed", "1", "Tell me a story.", home=tmp_path
    ) as screen:
        screen.wait_for("writing")
        screen.send("\x03")
        assert screen.wait() == 130
        assert screen.echoes()
        assert "Traceback" not in screen.text
