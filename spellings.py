"""What a reader of the paper types: its sections, arguments, words and YAML files, as our flags.

    distribution: {type: fsdp}     --distribution.type=fsdp     distribution = 'fsdp'
    lora_config: {lora_r: 4}       --lora_config.lora_r=4       lora_r = 4
    train: {mixed_precision: true} --train.mixed_precision=true mixed_precision = 'bf16'

configurator.override applies them. Functions raise ValueError with what is needed, in one line.
"""

ON_OFF = {"true": True, "yes": True, "on": True,  # the words of YAML
          "false": False, "no": False, "off": False}
# Section and setting, joined, where no end of it is the key that is meant
ALIASES = dict(distribution_type="distribution", lora_config_r="lora_r",
               lora_config_alpha="lora_alpha", lora_config_dropout="lora_dropout",
               distillation_model_type="distilled_model_type",
               distillation_model_weights="distilled_model_weights",
               dino_head_hidden_dim="head_hidden_dim",
               dino_head_bottleneck_dim="head_bottleneck_dim")
# Keys of the paper's Listings that a script lacks: one file of all Listings serves both scripts
LACKS = dict(train=("distilled_model_type", "distilled_model_weights", "load_from_disk"),
             distill=("dino_head_loss_weight", "ibot_loss_weight", "ibot_out_dim",
                      "ibot_norm_last_layer", "ibot_separate_head", "ibot_mask_sample_probability",
                      "ibot_mask_ratio_min_max", "freeze_last_layer",
                      "warmup_teacher_temp_iterations"))


def find_key(flag, keys):
    """The key that a flag means: --dino_head.out_dim and --dino-head-out-dim are dino_head_out_dim,
    and sections may stand before a key, as in --crops.global_crops_size. If no key is meant: the
    flag with underscores."""
    parts = flag.replace("-", "_").split(".")
    names = ["_".join(parts[i:]) for i in range(len(parts))]
    meant = [ALIASES.get(name, name) for name in names if name in ALIASES or name in keys]
    return (meant or names)[0]


def our_arguments(argv):
    """argv, in which --train_config_file FILE is FILE and -resume_from X is --resume_from=X, with
    one or two dashes, with or without = (the paper's section 2.1.3)."""
    arguments, rest = [], list(argv)
    while rest:
        arg = rest.pop(0)
        flag, equals, value = arg.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if flag.startswith("-") and name in ("train_config_file", "resume_from"):
            if not equals and rest and not rest[0].startswith("-"):
                equals, value = "=", rest.pop(0)
            arg = f"--{name}{equals}{value}"
            if name == "train_config_file" and value:
                arg = value
        arguments.append(arg)
    return arguments


def precision(text, current):
    """The word for mixed_precision=true or no: no, or the current one, bf16 if that is no."""
    on = ON_OFF.get(str(text).lower())
    if on is None:
        return text
    if not on:
        return "no"
    return "bf16" if current == "no" else current


def without_key(flag, text, script, is_file):
    """(known, note): whether a flag is a setting of the paper's files that a script has no key for,
    and the sentence for the log, '' = none. ValueError if it asks for the other script. is_file:
    the flag is a line of YAML, which may set what only the other script has."""
    if script not in LACKS:
        return False, ""
    [other] = LACKS.keys() - {script}
    name = flag.replace("-", "_").split(".")[-1]
    key = find_key(flag, LACKS[script])
    if key in LACKS[script] and is_file:
        return True, f"{key} has no effect here, only in {other}.py"
    if name not in ("downcast_bf16", "do_distillation"):
        return False, ""
    on = ON_OFF.get(str(text).lower())
    if on is None:
        raise ValueError(f"{name}={text!r}: needs true or false")
    if name == "downcast_bf16":
        return True, f"{name}={text} has no effect: it is a setting of Accelerate for TPUs"
    distills = script == "distill"
    if on != distills:
        raise ValueError(f"{name}={text}: {script}.py does not do that, {other}.py does; start it "
                         "with the same arguments")
    return True, ""


def read_yaml(path):
    """[(flag, text)] of a YAML file: `ibot: {out_dim: 8}` is ("ibot.out_dim", "8"). A value is the
    text of a flag, so 1e-4 is a number, which YAML 1.1 takes for a text. A list is a list of texts,
    null is ''. Quotes may be those that the paper's PDF has."""
    import yaml

    def text(node, name):
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"line {node.start_mark.line + 1}: {name or 'a key'} needs plain "
                             f"values, not a {node.id}")
        return "" if node.tag.endswith(":null") else node.value.strip("‘’“”")

    def walk(node, name=""):
        if isinstance(node, yaml.MappingNode):
            found = []
            for key, item in node.value:
                found += walk(item, f"{name}.{text(key, name)}".lstrip("."))
            return found
        if not name:
            raise ValueError("needs sections and keys, like train: {lr: 1e-4}")
        if isinstance(node, yaml.SequenceNode):
            return [(name, [text(item, name) for item in node.value])]
        return [(name, text(node, name))]

    try:
        with open(path, "rb") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
        return walk(root) if root else []
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        words = " ".join(str(error).replace(f'in "{path}", ', "").split())
        raise ValueError(f"{path}: {words[:200]}") from None
