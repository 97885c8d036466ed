"""Config files and flags: what is applied, what is refused and in which words, and that a saved
config runs again."""
import ast
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import configurator
from checks import Checks
from configurator import (UserError, config_text, describe, list_keys, one_line_errors,
                          override)
from tests_support import ROOT

SCRIPT = '''"""A tiny script.

    python tiny.py
"""
import os
from types import SimpleNamespace
from configurator import config_text, list_keys, read_command_line
# ==== config: all of it ====
lr = 1e-4                    # peak, absolute
steps = 100                  # iterations
shuffle = True               # a new order every epoch
model_name = 'tiny'          # the run's name
scale = (0.4, 1.0)           # share of the area
numbers = ()                 # () = not set
dino_head_out_dim = 64       # prototypes
_hidden = 3
CONSTANT = 4
config_keys = list_keys(globals())
late = 5

if __name__ == "__main__":
    sources = read_command_line(globals(), config_keys)
    config = SimpleNamespace(**{key: globals()[key] for key in config_keys})
    print(config_text(config), end="")
    print("# spin", os.environ.get("GOMP_SPINCOUNT"))
'''
KEYS = ["lr", "steps", "shuffle", "model_name", "scale", "numbers", "dino_head_out_dim"]


@pytest.fixture
def script(tmp_path):
    """The path of a tiny script with a config block."""
    path = tmp_path / "tiny.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def apply(script):
    """A function (*argv) -> the script's config after override, with `sources` beside it."""
    def run(*argv):
        namespace = {"__file__": str(script), "__name__": "tiny"}
        exec(SCRIPT, namespace)
        sources = override(namespace, namespace["config_keys"], [str(arg) for arg in argv])
        return {key: namespace[key] for key in KEYS} | dict(sources=sources, namespace=namespace)
    return run


@pytest.fixture
def config(tmp_path):
    """A function (text, name) -> the path of a config file."""
    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)
    return write


def refused(apply, *argv):
    """The lines of the error that the arguments raise."""
    with pytest.raises(UserError) as error:
        apply(*argv)
    return [line.strip() for line in str(error.value).split("\n")]


# ---- keys ----

def test_keys_are_the_plain_lower_case_globals_above_the_call():
    namespace = {"__name__": "tiny"}
    exec(SCRIPT, namespace)
    assert namespace["config_keys"] == KEYS  # in their order; no _hidden, CONSTANT, late, module
    assert list_keys(dict(a=None, b=[1], c={}, d=len, e=1)) == ["c", "e"]


# ---- what is applied ----

def test_nothing_given_changes_nothing(apply):
    found = apply()
    assert found["sources"] == {}
    assert found["lr"] == 1e-4 and found["steps"] == 100


def test_later_wins_and_flags_come_last(apply, config):
    first = config("lr = 1.0\nsteps = 1\nshuffle = False\n", "a.py")
    second = config("lr = 2.0\nsteps = 2\n", "b.py")
    found = apply("--lr=3", first, second)  # a flag before the files comes last, too
    assert (found["lr"], found["steps"], found["shuffle"]) == (3.0, 2, False)
    assert found["sources"] == dict(
        lr=(1e-4, "command line"), steps=(100, second), shuffle=(True, first))


def test_values_computed_from_current_ones(apply, config):
    first = config("steps = 50\n", "a.py")
    second = config("lr = steps / 1000\n_half = steps // 2\ndino_head_out_dim = _half\n", "b.py")
    found = apply(first, second)
    assert found["lr"] == 0.05 and found["dino_head_out_dim"] == 25


def test_imports_and_underscore_names_in_a_file_are_scratch(apply, config):
    text = "import math\nfrom math import sqrt\n_x = 3\nlr = math.pi * sqrt(_x)\n"
    found = apply(config(text))
    assert found["lr"] == pytest.approx(5.4413981)
    assert "math" not in found["namespace"] and "_x" not in found["namespace"]


@pytest.mark.parametrize("flag", [
    "dino_head_out_dim", "dino-head-out-dim", "dino_head.out_dim", "dino_head.out-dim",
    "heads.dino_head_out_dim"])
def test_dots_dashes_and_sections_in_a_flag(apply, flag):
    assert apply(f"--{flag}=8192")["dino_head_out_dim"] == 8192


@pytest.mark.parametrize("flag, key, value", [
    ("--lr=1", "lr", 1.0),
    ("--lr=5e-4", "lr", 5e-4),
    ("--numbers=-1.5", "numbers", (-1.5,)),
    ("--steps=1e5", "steps", 100000),
    ("--steps=2.0", "steps", 2),
    ("--steps=-1", "steps", -1),
    ("--shuffle=false", "shuffle", False),
    ("--shuffle=False", "shuffle", False),
    ("--shuffle=TRUE", "shuffle", True),
    ("--shuffle=yes", "shuffle", True),
    ("--shuffle=off", "shuffle", False),
    ("--model_name=2024", "model_name", "2024"),
    ("--model_name=a=b", "model_name", "a=b"),
    ("--model_name=", "model_name", ""),
    ("--model_name=__import__('os')", "model_name", "__import__('os')"),  # never evaluated
    ("--scale=(0.1, 1)", "scale", (0.1, 1.0)),
    ("--scale=0.1,1", "scale", (0.1, 1.0)),
    ("--scale=[0.1,1]", "scale", (0.1, 1.0)),
    ("--numbers=0.5", "numbers", (0.5,)),
    ("--numbers=1,2,3", "numbers", (1.0, 2.0, 3.0)),
    ("--numbers=()", "numbers", ())])
def test_values_take_the_type_of_the_default(apply, flag, key, value):
    found = apply(flag)[key]
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


# ---- what is refused ----

@pytest.mark.parametrize("flag, message", [
    ("--lr=fast", "lr = 'fast' (str), needs finite float like 0.0001"),
    ("--lr=true", "lr = 'true' (str), needs finite float like 0.0001"),
    ("--lr=True", "lr = True (bool), needs finite float like 0.0001"),
    ("--steps=1.5", "steps = 1.5 (float), needs int like 100"),
    ("--steps=1e999", "steps = inf (float), needs int like 100"),
    ("--steps=2**3", "steps = '2**3' (str), needs int like 100"),  # a flag is not evaluated
    ("--shuffle=1", "shuffle = '1' (str), needs true or false"),
    ("--shuffle=maybe", "shuffle = 'maybe' (str), needs true or false"),
    ("--scale=0.4", "scale = (0.4,) (tuple), needs tuple of 2 like (0.4, 1.0)"),
    ("--scale=1,2,3", "scale = (1, 2, 3) (tuple), needs tuple of 2 like (0.4, 1.0)"),
    ("--scale=(0.4,'x')", "scale = (0.4, 'x') (tuple), needs finite float like 1.0"),
    ("--numbers=abc", "numbers = 'abc' (str), needs tuple of numbers"),
    ("--shuffle", "--shuffle has no value, write --shuffle=VALUE like --shuffle=True"),
    ("--stepz=3", "unknown key 'stepz', did you mean 'steps'?"),
    ("--dino_head.out_dum=3",
     "unknown key 'dino_head_out_dum', did you mean 'dino_head_out_dim'?"),
    ("--qqqq=3", "unknown key 'qqqq'; --help lists the keys"),
    ("--late=3", "unknown key 'late'; --help lists the keys"),
    ("--CONSTANT=3", "unknown key 'CONSTANT'; --help lists the keys"),
    ("--__name__=evil", "unknown key '__name__'; --help lists the keys")])
def test_one_bad_flag_is_one_sentence(apply, flag, message):
    assert refused(apply, flag) == [f"command line: {message}"]


def test_types_in_a_file_are_checked(apply, config):
    text = "lr = '5e-4'\nsteps = 1.5\nshuffle = 1\nmodel_name = 3\nscale = (0.4, '1')\n"
    path = config(text)
    assert refused(apply, path) == [
        f"{path}: lr = '5e-4' (str), needs finite float like 0.0001",
        f"{path}: steps = 1.5 (float), needs int like 100",
        f"{path}: shuffle = 1 (int), needs true or false",
        f"{path}: model_name = 3 (int), needs str like 'tiny'",
        f"{path}: scale = (0.4, '1') (tuple), needs finite float like 1.0"]


def test_all_mistakes_come_at_once(apply, config):
    first = config("stepz = 3\nlr = 'x'\n", "a.py")
    second = config("lr = 1 / 0\n", "b.py")
    lines = refused(apply, first, second, "nowhere.py", "--steps=x", "--shuffle")
    assert lines == [
        f"{first}: lr = 'x' (str), needs finite float like 0.0001",
        f"{first}: unknown key 'stepz', did you mean 'steps'?",
        f"{second}: ZeroDivisionError: division by zero",
        "nowhere.py: no such config file",
        "command line: steps = 'x' (str), needs int like 100",
        "command line: --shuffle has no value, write --shuffle=VALUE like --shuffle=True"]


def test_a_file_that_does_not_parse_is_named(apply, config):
    path = config("lr = = 3\n")
    [line] = refused(apply, path)
    assert line.startswith(f"{path}: SyntaxError: ")


@pytest.mark.parametrize("text, message", [
    ("lr = nothing\n", "NameError: name 'nothing' is not defined"),
    ("steps = float('nan')\n", "steps = nan (float), needs int like 100"),
    ("steps = True\n", "steps = True (bool), needs int like 100"),
    ("CONSTANT = 5\n", "unknown key 'CONSTANT'; --help lists the keys"),
    ("sys = 3\n", "unknown key 'sys'; --help lists the keys"),
    ("late = 3\n", "unknown key 'late'; --help lists the keys")])
def test_one_bad_line_in_a_file(apply, config, text, message):
    path = config(text)
    assert refused(apply, path) == [f"{path}: {message}"]


def test_a_missing_file_has_a_nearest_name(apply, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "pathmnist.py").write_text("")
    monkeypatch.chdir(tmp_path)
    [line] = refused(apply, "config/pathmnis.py")
    assert line == "config/pathmnis.py: no such config file, did you mean config/pathmnist.py?"


# ---- what is printed and saved ----

def test_describe_marks_what_was_changed(apply, config):
    path = config("steps = 7\n")
    found = apply(path, "--scale=0.5,1")
    lines = describe(found["namespace"], KEYS, found["sources"]).split("\n")
    assert len(lines) == len(KEYS)
    assert f"* steps             = 7   (default 100, from {path})" in lines
    default = "(default (0.4, 1.0), from command line)"
    assert f"* scale             = (0.5, 1.0)   {default}" in lines
    assert "  model_name        = 'tiny'" in lines


def test_a_saved_config_gives_the_same_values(apply, config):
    found = apply("--lr=1e-7", "--steps=3", "--shuffle=false", "--model_name=it's \"a\" \\ test",
                  "--scale=0.1,0.123456789012345678", "--numbers=1,2")
    values = {key: found[key] for key in KEYS}
    again = apply(config(config_text(SimpleNamespace(**values))))
    assert {key: again[key] for key in KEYS} == values


def run_script(script, *argv, **environment):
    """Run a script as a process of its own, in the root of the repository."""
    return subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": ROOT, **environment})


def test_a_script_on_the_command_line(script):
    result = run_script(script, "--steps=3")
    assert result.returncode == 0 and "steps = 3\n" in result.stdout
    result = run_script(script, "--stepz=3", "--lr=x")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == (
        "error: command line: unknown key 'stepz', did you mean 'steps'?\n"
        "       command line: lr = 'x' (str), needs finite float like 0.0001\n")


def test_threads_that_wait_spin_for_a_short_time(script, monkeypatch):
    """What the user has set stays."""
    assert "# spin 7" in run_script(script, GOMP_SPINCOUNT="7").stdout
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert "# spin None" in run_script(script, OMP_WAIT_POLICY="PASSIVE").stdout
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "# spin 10000" in run_script(script).stdout


def test_only_user_errors_lose_their_traceback():
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise UserError("x=3: must be 4")
    assert stop.value.code == "error: x=3: must be 4"
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a bug")


@pytest.mark.parametrize("text", ["lr = max", "lr = float('inf')"])
def test_what_would_not_run_again_is_refused(apply, config, text):
    assert "needs finite float like 0.0001" in refused(apply, config(text))[0]


def test_imported_constants_are_no_keys(apply, config):
    assert apply(config("from math import pi\nlr = pi / pi"))["lr"] == 1.0


def test_checks_report_all_errors_at_once():
    check = Checks(SimpleNamespace(steps=0))
    check.need(False, "set it")
    check.need(True, "it is set")
    check.need(False, "set this")
    with pytest.raises(UserError) as error:
        check.report()
    assert [line.strip() for line in str(error.value).split("\n")] == ["set it", "set this"]
    check = Checks(SimpleNamespace(kind="a"))
    check.note(True, "no effect")
    check.note(False, "an effect")
    assert check.report() == ["no effect"]


# ---- help ----

def help_of(apply, capsys, *argv):
    """What the script prints before it exits with 0."""
    with pytest.raises(SystemExit) as stop:
        apply(*argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_docstring_and_block(apply, capsys, flag):
    text = help_of(apply, capsys, "--nonsense=1", flag)
    assert text.startswith("A tiny script.") and "python tiny.py" in text
    assert "lr = 1e-4                    # peak, absolute" in text
    assert "dino_head_out_dim = 64" in text
    for word in ("import os", "config_keys", "====", "Config files"):
        assert word not in text


def test_help_lists_the_config_files_of_the_script(apply, capsys, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    files = {"a.py": "Small.\n\n    python tiny.py config/a.py\n",
             "longer.py": "Large.\n\n    python tiny.py config/a.py config/longer.py\n",
             "other.py": "Of another script.\n\n    python other.py config/other.py\n"}
    for name, docstring in files.items():
        (tmp_path / "config" / name).write_text(f'"""{docstring}"""\nlr = 1.0\n')
    monkeypatch.setattr(configurator, "HERE", str(tmp_path))
    text = help_of(apply, capsys, "--help")
    listed = "Config files:\n  config/a.py       Small.\n  config/longer.py  Large.\n\n"
    assert listed in text and "other" not in text


@pytest.mark.parametrize("word, keys", [
    ("scale", ["scale"]),
    ("STEPS", ["steps"]),
    ("order", ["shuffle"]),  # a word of its comment
    ("name", ["model_name"])])
def test_help_with_a_word_prints_only_the_keys_with_it(apply, capsys, word, keys):
    lines = help_of(apply, capsys, f"--help={word}").splitlines()
    assert [line.split(" = ")[0] for line in lines] == keys


def test_help_with_a_word_that_no_key_has(apply, capsys):
    text = help_of(apply, capsys, "--help=qqqq")
    assert text == "no key contains 'qqqq'; --help prints all keys\n"


SCRIPTS = ("train", "distill", "evaluate", "attention", "bench", "tables")


@pytest.mark.parametrize("script", ["train", "distill"])
def test_help_of_the_scripts_lists_every_config_file_with_its_first_line(script):
    text = run_script(f"{script}.py", "--help").stdout
    files = sorted(os.listdir(os.path.join(ROOT, "config")))
    for name in [name for name in files if name.endswith(".py")]:
        with open(os.path.join(ROOT, "config", name)) as file:
            docstring = ast.get_docstring(ast.parse(file.read()))
        found = [line for line in text.splitlines() if line.startswith(f"  config/{name} ")]
        if name.startswith("distill") == (script == "distill"):
            [line] = found
            assert line.endswith(f"  {docstring.splitlines()[0]}")
        else:
            assert found == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_whose_reader_has_gone_ends_without_a_traceback(script):
    """python train.py --help | head -1"""
    command = f'"{sys.executable}" {script}.py --help | head -1; exit "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert len(result.stdout.splitlines()) == 1
    # the pipe is closed before the first byte is written
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT,
                            stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize("argv, status, words", [
    (["--help"], 0, "Config keys with their defaults"),
    (["--devic=cpu"], 1, "unknown key 'devic', did you mean 'device'?"),
    (["config/phantm.py"], 1, "no such config file, did you mean config/phantom.py?")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_mistake_answer_at_once(script, argv, status, words):
    """Best of three, because other programs may run. To import torch takes several seconds."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = run_script(f"{script}.py", *argv)
        seconds.append(time.perf_counter() - began)
        assert result.returncode == status and "Traceback" not in result.stderr
        assert words in result.stdout + result.stderr
    assert min(seconds) < 1
