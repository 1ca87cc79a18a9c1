"""dsv2: pretraining of DeepSeek-V2-style models (Multi-head Latent Attention + DeepSeekMoE)."""

import sys

_MOVED = {f"dsv2.{name}": name for name in ("check", "export", "generate", "plan")} | {
    "dsv2.model.cache": "cache"
}
# While Python looks for the module of `python -m MODULE`, it imports the package and sys.argv[0] is "-m".
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
    _module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if _module in _MOVED:
        _text = f"python -m {_module}: this command is now python -m dsv2 {_MOVED[_module]}"
        print(f"error: {_text}", file=sys.stderr)
        sys.exit(2)
