"""Config files and flags: what is accepted, what is refused, and in which words."""
import subprocess
import sys
import types

import pytest

from configurator import UserError, describe, dump, list_keys, override


def namespace():
    values = dict(lr=1e-4, steps=100, warmup=10, name="run", flip=True, scale=(0.4, 1.0), mean=(), teacher_temp=0.07, dino_head_out_dim=64, crops_size=8)
    return dict(values, sys=sys, CONSTANT=3, _private=1), list(values)


def apply(*argv, tmp_path=None, files=()):
    values, keys = namespace()
    paths = []
    for i, text in enumerate(files):
        paths.append(str(tmp_path / f"c{i}.py"))
        (tmp_path / f"c{i}.py").write_text(text)
    return values, override(values, keys, [*paths, *argv])


def test_list_keys_takes_plain_lower_case_globals():
    values, keys = namespace()
    assert list_keys(values) == keys


def test_flags_take_the_type_of_the_default():
    values, sources = apply("--lr=1", "--steps=1e5", "--name=a=b", "--flip=false", "--scale=0.1,0.5", "--mean=0.5", "--dino_head.out_dim=8",
                            "--teacher-temp=0.04", "--whatever.crops_size=16")
    assert values["lr"] == 1.0 and type(values["lr"]) is float and values["steps"] == 100000 and type(values["steps"]) is int
    assert values["name"] == "a=b" and values["flip"] is False and values["scale"] == (0.1, 0.5) and values["mean"] == (0.5,)
    assert values["dino_head_out_dim"] == 8 and values["teacher_temp"] == 0.04 and values["crops_size"] == 16
    assert sources["lr"] == (1e-4, "command line")


def test_a_str_is_never_evaluated():
    assert apply("--name=__import__('os')")[0]["name"] == "__import__('os')"


def test_files_apply_in_order_and_see_current_values(tmp_path):
    values, sources = apply("--lr=3", tmp_path=tmp_path, files=["steps = 500\nlr = 1", "import math\n_half = steps // 2\nwarmup = _half // 10\nlr = 2\n"])
    assert (values["steps"], values["warmup"], values["lr"]) == (500, 25, 3.0) and sources["warmup"][1].endswith("c1.py")


@pytest.mark.parametrize("argv, message", [
    (["--steps=1.5"], "command line: steps = 1.5 (float), needs int like 100"),
    (["--steps=true"], "needs int"), (["--flip=1"], "needs true or false"), (["--lr=hot"], "needs float like 0.0001"),
    (["--scale=0.1"], "needs tuple of 2 like (0.4, 1.0)"), (["--scale=0.1,b"], "needs tuple"),
    (["--teacher_tmp=1"], "unknown key 'teacher_tmp', did you mean 'teacher_temp'?"),
    (["--flip"], "--flip has no value, write --flip=VALUE"), (["--__name__=evil"], "unknown key"), (["--CONSTANT=4"], "unknown key"),
    (["nowhere.py"], "nowhere.py: no such config file"),
])
def test_refused_on_the_command_line(argv, message):
    with pytest.raises(UserError) as error:
        apply(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("learning_rate = 1", "unknown key 'learning_rate'"), ("lr = '5e-4'", "lr = '5e-4' (str), needs float"), ("steps = True", "needs int"),
    ("lr = (", "SyntaxError"), ("lr = nothing", "NameError"), ("sys = 3", "unknown key 'sys'"), ("steps = float('nan')", "needs int"),
])
def test_refused_in_a_file(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        apply(tmp_path=tmp_path, files=[text])
    assert message in str(error.value) and "c0.py" in str(error.value)


def test_all_errors_come_together_and_nothing_else_is_touched(tmp_path):
    values, keys = namespace()
    (tmp_path / "c.py").write_text("lr = 'x'\nnam = 1\nsteps = 7\n")
    with pytest.raises(UserError) as error:
        override(values, keys, [str(tmp_path / "c.py"), "--flip=2", "--scale=1"])
    assert all(text in str(error.value) for text in ("lr = 'x'", "'nam'", "flip = '2'", "scale = (1,)"))
    assert values["CONSTANT"] == 3 and isinstance(values["sys"], types.ModuleType)


def test_dump_runs_again_and_describe_marks_changes(tmp_path):
    values, sources = apply("--lr=2e-5", "--scale=0.2,0.9", "--name=it's")
    keys = namespace()[1]
    again, _ = apply(tmp_path=tmp_path, files=[dump(values, keys)])
    assert all(again[key] == values[key] for key in keys)
    lines = describe(values, keys, sources).splitlines()
    assert lines[0].startswith("* lr") and "default 0.0001, from command line" in lines[0] and lines[1].startswith("  steps")


def test_help_and_errors_of_a_script(tmp_path):
    import configurator
    script = tmp_path / "script.py"
    script.write_text(f'"""What it does."""\nimport sys\nsys.path.insert(0, {configurator.__file__.rsplit("/", 1)[0]!r})\n'
                      "from configurator import list_keys, one_line_errors, override\n# ==== config ====\n# ---- group ----\nlr = 0.1  # step size\n"
                      "config_keys = list_keys(globals())\nif __name__ == '__main__':\n    with one_line_errors():\n"
                      "        print(override(globals(), config_keys, sys.argv[1:]))\n")
    helped = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "What it does." in helped.stdout and "# ---- group ----\nlr = 0.1  # step size" in helped.stdout
    failed = subprocess.run([sys.executable, str(script), "--lrr=1"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr == "error: command line: unknown key 'lrr', did you mean 'lr'?\n"
