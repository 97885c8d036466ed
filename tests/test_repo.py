"""The repository as a reader finds it: no import cycles, no dead keys, README commands that exist, tests everywhere."""
import ast
import os
import re
import shlex

import pytest

from configurator import override
from tests_support import ROOT, load_script

MODULES = sorted(file[:-3] for file in os.listdir(ROOT) if file.endswith(".py"))
SCRIPTS = [name for name in MODULES if "\nconfig_keys = list_keys(" in open(os.path.join(ROOT, f"{name}.py")).read()]
CONFIGS = sorted(file for file in os.listdir(os.path.join(ROOT, "config")) if file.endswith(".py"))


def tree(name):
    return ast.parse(open(os.path.join(ROOT, f"{name}.py")).read())


def imports(name):
    """Modules of ours that a module imports."""
    nodes = list(ast.walk(tree(name)))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)} | \
        {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names & set(MODULES)


def test_imports_form_a_dag_with_scripts_on_top():
    seen, done = set(), set()

    def visit(name):
        assert name not in seen or name in done, f"import cycle through {name}"
        seen.add(name)
        for other in imports(name):
            assert other not in SCRIPTS or other == "evaluate", f"{name} imports the script {other}"   # as DESIGN says
            visit(other)
        done.add(name)
    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_is_read_and_none_is_assigned(script):
    """A key that nothing reads lies to its user; a key assigned in a function becomes local there and raises when read."""
    module = load_script(script)
    functions = [node for node in ast.walk(tree(script)) if isinstance(node, ast.FunctionDef)]
    names = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    # evaluate.py rebuilds a run's backbone from its config, so that function reads these keys for both
    shared = next(node for node in tree("model").body if getattr(node, "name", "") == "backbone_from_config")
    read |= {node.value for node in ast.walk(shared) if isinstance(node, ast.Constant)} if script in ("train", "distill") else set()
    assert set(module.config_keys) - read == set()
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert set(module.config_keys) & assigned == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_has_a_comment(script):
    source = open(os.path.join(ROOT, f"{script}.py")).read()
    for key in load_script(script).config_keys:
        assert re.search(rf"^{key} = .*#", source, re.M), f"{key} has no comment"


@pytest.mark.parametrize("config", CONFIGS)
def test_config_file_has_a_header_with_its_command(config):
    source = open(os.path.join(ROOT, "config", config)).read()
    assert f"config/{config}" in ast.get_docstring(ast.parse(source))


def test_readme_commands_parse_and_name_what_exists():
    readme = open(os.path.join(ROOT, "README.md")).read()
    commands = re.findall(r"^(?:torchrun|python)\s.*$", "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", readme, re.S)).replace("\\\n", " "), re.M)
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None or not script[:-3] in SCRIPTS:
            assert script is None or os.path.isfile(os.path.join(ROOT, script)), command
            continue
        module = load_script(script[:-3])
        argv = [os.path.join(ROOT, word) if word.startswith("config/") else word for word in words[words.index(script) + 1:]
                if not word.startswith("out/") and word != "--help"]
        override(vars(module), module.config_keys, argv)


def test_readme_names_files_that_exist():
    readme = open(os.path.join(ROOT, "README.md")).read()
    for name in re.findall(r"[`(]([\w/]+\.(?:py|txt|png|json))[`)]", readme):
        if name.split("/")[0] not in ("out", "samples", "results"):                        # what a run writes
            assert os.path.exists(os.path.join(ROOT, name)), name


def test_every_test_file_has_tests():
    for file in os.listdir(os.path.join(ROOT, "tests")):
        if file.startswith("test_"):
            assert "def test_" in open(os.path.join(ROOT, "tests", file)).read(), file
