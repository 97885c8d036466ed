"""Config files and --key=value flags, applied to the globals of a script; or one clear error.

A script (train.py) begins with a block of lower-case globals, one line each: bool, int, float,
str, tuple or dict. The block stands before the imports that take seconds, so that --help, a typo
and a missing file answer at once:

    # ==== config ====
    lr = 1e-4           # peak, absolute
    config_keys = list_keys(globals())
    if __name__ == "__main__":
        sources = read_command_line(globals(), config_keys)

    import torch
    ...

A config file is a Python file of plain assignments. It runs in a scratch namespace that holds the
current values, so `warmup_iterations = max_iterations // 10` works. A YAML file, as the paper
prints it (Listings 1 to 8), is a list of flags: `dino_head: {out_dim: 8}` is --dino_head.out_dim=8.
Files apply from left to right, then the flags: what comes later wins.
"""
import ast
import contextlib
import difflib
import errno
import glob
import os
import re
import signal
import sys

from bounds import problem, range_text, shown
from signals import end_by
from spellings import ON_OFF, find_key, our_arguments, precision, read_yaml, without_key

HERE = os.path.dirname(os.path.abspath(__file__))


class UserError(ValueError):
    """A mistake that the user can mend: bad input, bad key, bad file.

    The message is one line: what is wrong, the value, the rule, the fix.
    """


@contextlib.contextmanager
def one_line_errors():
    """Around a whole program: it ends with one line and exit status 1, without a traceback, after
    a UserError, if a file or folder refuses what is asked of it, and if memory or the disk is full.
    Bugs keep their traceback. Ctrl-C ends it by SIGINT, as a shell's loop needs it."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; what was written before stays as it is", file=sys.stderr)
        end_by(signal.SIGINT)
    except UserError as error:
        keys = getattr(sys.modules["__main__"], "config_keys", None)
        sys.exit(f"error: {own_advice(str(error), keys)}")
    except OSError as error:
        file = error.filename or "a log file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: {error.strerror}: {file} cannot be written; make space. The last "
                     "checkpoint is good, --resume_from=auto goes on from there")
        if error.filename is None:
            raise
        sys.exit(f"error: {error.strerror}: {shown(file)}")
    except (MemoryError, RuntimeError) as error:
        words = str(error).split("\n")[0]
        if not isinstance(error, MemoryError) and not re.search("memory|allocate", words):
            raise
        sys.exit(f"error: out of memory: {words[:200]}. Smaller batches, crops or networks need "
                 "less; the last checkpoint is good")


def own_advice(message, keys):
    """A message without the advice to set a key that the script does not have, as the readers of
    images give it to all scripts. keys: of list_keys, None = leave the message as it is."""
    def kept(match):
        return match[0] if keys is None or match[1] in keys else ""
    return re.sub(r"(?:, or|;) (?:(?!, or )[^;])*?--(\w+)[^;]*", kept, message)


def read_command_line(namespace, keys):
    """Apply this program's command line to the globals of a script; returns sources of `override`.

    Call it before torch is imported: it also shortens how long OpenMP's threads spin while they
    wait for each other. With the default, a run on cores that other programs use as well takes
    seven times as long. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a fifth if the run is
    alone. docs/RESULTS.md has the table. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's OpenMP, that of torch on Linux
    with one_line_errors():
        return override(namespace, keys, sys.argv[1:])


def list_keys(namespace):
    """Names of the config keys, in their order: the lower-case globals above the call whose value
    is a bool, int, float, str, tuple or dict."""
    plain = (bool, int, float, str, tuple, dict)
    return [name for name, value in namespace.items()
            if name == name.lower() and not name.startswith("_") and isinstance(value, plain)]


def coerce(value, default):
    """`value` in the type of `default`, if nothing is lost; else TypeError with what is needed."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):  # before int: in Python a bool is an int
        if isinstance(value, bool):
            return value
        raise TypeError("true or false")
    if isinstance(default, int):  # 1e5 is an int because nothing is lost
        if is_number and value == value // 1:
            return int(value)
        raise TypeError(f"int like {default}")
    if isinstance(default, float):
        if is_number and abs(value) <= sys.float_info.max:  # not nan, not an int beyond all floats
            return float(value)
        raise TypeError(f"finite float like {default}")
    if isinstance(default, str):
        if not isinstance(value, str):
            raise TypeError(f"str like {default!r}")
        if "\0" in value or re.search("[\ud800-\udfff]", value):
            raise TypeError("text in UTF-8 without NUL")
        return str(value)
    if isinstance(default, dict):
        with contextlib.suppress(ValueError, SyntaxError):  # only what runs again in config.py
            if isinstance(value, dict) and ast.literal_eval(repr(value)) == value:
                return {str(name): item for name, item in value.items()}
        raise TypeError("dict of plain values like {'mlp_ratio': 2}")
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"tuple like {default}" if default else "tuple of numbers")
    if not default:  # () means: not set; then any number of numbers may be given
        return tuple(coerce(item, 0.0) for item in value)
    if len(value) != len(default):
        raise TypeError(f"tuple of {len(default)} like {default}")
    return tuple(coerce(item, like) for item, like in zip(value, default))


def _parse(text, default):
    """The text after `--key=`, or a list of texts, as a Python value. A str stays as typed; it is
    never evaluated. default=None: the type is unknown, and words like true are a bool."""
    if isinstance(default, str):
        return text if isinstance(text, str) else ",".join(text)
    if not isinstance(text, str):
        return tuple(_parse(item, None) for item in text)
    if isinstance(default, bool) or default is None and text.lower() in ON_OFF:
        return ON_OFF.get(text.lower(), text)
    if not text and not default and not isinstance(default, (int, float)):
        return default  # () or {}: not set
    try:
        value = ast.literal_eval(text)  # for Python, 0.4,1.0 is a tuple like (0.4, 1.0)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # not a number; coerce words the error
    if isinstance(default, tuple) and isinstance(value, (int, float)):
        return (value,)
    return value


PATH_ENDINGS = ("_path", "_dir", "_from", "_type", "_weights", "_cache")
PATH_KEYS = ("run", "compare", "images", "masks",  # some of them are lists: out/a,out/b
             "model", "models", "teachers", "output", "probe", "query")


def _expand(key, value):
    """The value of a path key with the home folder in place of ~, which a shell leaves alone in
    --key=~/x; other values as they are. TypeError with what is needed if ~NAME is nobody's home."""
    if not key.endswith(PATH_ENDINGS) and key not in PATH_KEYS or "~" not in value:
        return value
    paths = [os.path.expanduser(path) for path in value.split(",")]
    if any(path.startswith("~") for path in paths):
        raise TypeError("the name of a user who has a home, or ./~ for a folder named ~")
    return ",".join(paths)


def _unknown(name, keys):
    near = difflib.get_close_matches(name, keys, n=1)
    advice = f", did you mean {near[0]!r}?" if near else "; --help lists the keys"
    return f"unknown key {name!r}{advice}"


def _no_config_file(path):
    """Why a path cannot be a config file, in one line with the nearest name."""
    if path.startswith("-"):
        return f"{path}: a flag has two dashes, like -{path}"
    if os.path.exists(path):
        return f"{path}: is no file but a folder or a pipe; give a .py file of assignments"
    files = glob.glob("config/*.py") + glob.glob("*/config/*.py")
    near = difflib.get_close_matches(path, files, n=1)
    advice = f", did you mean {near[0]}?" if near else ""
    return f"{path}: no such config file{advice}"


def _streams():
    """[(stdout, is it closed, is its descriptor open), the same of stderr]."""
    streams = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        closed = stream is not None and stream.closed
        streams.append((stream, closed, os.path.exists(f"/dev/fd/{number}")))
    return streams


def _run_file(path, values):
    """The names that a config file defines, as a dict; UserError if the file does not run."""
    if not os.path.isfile(path):
        raise UserError(_no_config_file(path))
    scratch, before = dict(values), _streams()
    try:
        with open(path, "rb") as file:  # bytes: Python finds the encoding
            tree = ast.parse(file.read(), path)
        exec(compile(tree, path, "exec"), scratch)
    except BaseException as error:  # also exit(): whatever is wrong inside is the user's
        words = ""
        with contextlib.suppress(Exception):  # the words may fail as well
            words = str(error).split("\n")[0]
        raise UserError(f"{path}: {type(error).__name__}: {words}") from None
    finally:
        after = _streams()
        sys.stdout, sys.stderr = before[0][0], before[1][0]
    if after != before:
        if sys.stderr.closed:
            sys.stderr = open(2, "w", closefd=False)
        raise UserError(f"{path}: closes or replaces stdout or stderr, which the run needs")
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    imported -= set(values)
    return {name: value for name, value in scratch.items()
            if not name.startswith("_") and name not in imported}


# ---- help ----

def _config_files(script):
    """[(path, first line)] of the files in config/ whose docstring has a command of `script`."""
    files = []
    for path in sorted(glob.glob(os.path.join(HERE, "config", "*.py"))):
        docstring = ast.get_docstring(ast.parse(open(path).read())) or ""
        if f"{script} config/" in docstring:
            files.append((f"config/{os.path.basename(path)}", docstring.split("\n")[0]))
    return files


def help_text(namespace, word=""):
    """What --help prints: docstring, config files and config block of a script. With a word: only
    the keys whose name or comment contains the word."""
    source = open(namespace["__file__"]).read()
    block = source.split("# ==== config", 1)[1].split("config_keys =", 1)[0]
    script, lines = script_name(namespace), block.rstrip().split("\n")[1:]
    for i, line in enumerate(lines):
        if allowed := range_text(line.split(" =")[0], script):
            lines[i] = f"{line}  [{allowed}]"
    if word:
        keys = [line for line in lines if re.match("[a-z]", line)]
        found = [line for line in keys if word.lower() in line.lower()]
        return "\n".join(found) or f"no key contains {word!r}; --help prints all keys"
    files = _config_files(os.path.basename(namespace["__file__"]))
    width = max((len(path) for path, _ in files), default=0)
    listed = "".join(f"\n  {path:{width}}  {what}" for path, what in files)
    parts = [(namespace["__doc__"] or "").strip()]
    if files:
        parts.append(f"Config files:{listed}")
    parts.append("Config keys with their defaults. Change them in a config file or with "
                 "--key=value;\n--help=WORD prints only the keys with that word:\n"
                 + "\n".join(lines))
    return "\n\n".join(parts)


def script_name(namespace):
    """'train' of train.py, from the globals of a script."""
    return os.path.basename(namespace.get("__file__", "")).removesuffix(".py")


def _print_and_exit(text):
    """Print, and exit with 0 even if the reader has gone, as `| head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    sys.exit(0)


# ---- files and flags -> globals ----

def override(namespace, keys, argv):
    """Apply config files and flags to the globals of a script.

    Args: namespace: globals() of the script, changed in place; keys: of list_keys; argv: for
    example ['config/phantom.py', '--lr=1e-3']. --help and --help=WORD print, and exit.
    Returns: sources, {key: (default, where the value came from)} of the changed keys, for describe.
    Raises: UserError with every mistake at once, each with its source and the nearest key; a value
    outside of bounds.BOUNDS is one.
    """
    for arg in argv:
        if arg in ("--help", "-h") or arg.startswith("--help="):
            _print_and_exit(help_text(namespace, arg.partition("=")[2]))
    defaults = {key: namespace[key] for key in keys}
    sources, errors, notes = {}, [], []
    script, argv = script_name(namespace), our_arguments(argv)

    def assign(key, value, source):
        if key not in defaults:
            errors.append(f"{source}: {_unknown(key, keys)}")
            return
        try:
            value = _expand(key, coerce(value, defaults[key]))
        except (TypeError, OverflowError, ValueError) as error:
            kind = type(value).__name__
            errors.append(f"{source}: {key} = {shown(value)} ({kind}), needs {error}")
            return
        if isinstance(value, dict):
            for name in [name for name in value if name in defaults]:  # hidden_size is a key itself
                assign(name, value.pop(name), source)
        if value != namespace[key]:
            namespace[key], sources[key] = value, (defaults[key], source)

    def assign_text(flag, text, source):
        """A flag, or a line of YAML."""
        key = find_key(flag, keys)
        *_, section, entry = f".{flag}".replace("-", "_").split(".")
        if key == "mixed_precision" and key in defaults:
            text = precision(text, namespace[key])
        try:
            known, note = without_key(flag, text, script, is_file=source != "command line")
        except ValueError as error:
            errors.append(f"{source}: {error}")
            return
        if known:
            notes.append(note)
        elif key not in defaults and entry and isinstance(defaults.get(section), dict):
            assign(section, {**namespace[section], entry: _parse(text, None)}, source)
        else:
            assign(key, _parse(text, defaults.get(key)), source)

    for path in [arg for arg in argv if not arg.startswith("--")]:
        current = {key: namespace[key] for key in keys}
        try:
            if path.endswith((".yaml", ".yml")) and os.path.isfile(path):
                for flag, text in read_yaml(path):
                    assign_text(flag, text, path)
            else:
                for key, value in _run_file(path, current).items():
                    assign(key, value, path)
        except ValueError as error:
            errors.append(str(error))
    for arg in [arg for arg in argv if arg.startswith("--")]:
        flag, equals, text = arg[2:].partition("=")
        key = find_key(flag, keys)
        if not equals and key in (*defaults, "train_config_file"):
            errors.append(f"command line: {arg} has no value, write --{key}=VALUE like "
                          f"--{key}={defaults.get(key, 'config.yaml')}")
        else:
            assign_text(flag, text, "command line")
    for key in keys:  # those of the script, too: its block is there to be edited
        if wrong := problem(key, namespace[key], script):
            _, source = sources.get(key, ("", f"{script}.py"))
            errors.append(f"{source}: {wrong}")
    if errors:
        raise UserError("\n       ".join(errors))
    for note in filter(None, notes):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"note: {note}")
    return sources


def describe(namespace, keys, sources):
    """The resolved config as text, one key a line; changed keys have a `*`, their default and the
    source of their value."""
    width = max(len(key) for key in keys)
    lines = []
    for key in keys:
        line = f"{'*' if key in sources else ' '} {key:{width}} = {namespace[key]!r}"
        if key in sources:
            default, source = sources[key]
            line += f"   (default {default!r}, from {source})"
        lines.append(line)
    return "\n".join(lines)


def config_text(config):
    """The resolved config, a namespace, as a runnable config file."""
    return "".join(f"{key} = {value!r}\n" for key, value in vars(config).items())
