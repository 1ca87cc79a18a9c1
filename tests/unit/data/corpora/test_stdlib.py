"""The standard library's files."""

from data.corpora.stdlib import StdlibCorpus


def test_stdlib() -> None:
    source = StdlibCorpus()
    files = source.files()
    names = [path.relative_to(source.root()).as_posix() for path in files]
    assert names == [path.relative_to(source.root()).as_posix() for path in sorted(files)]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    documents = source.documents([])
    name, text = next(documents)
    assert (source.root() / name).read_bytes().decode() == text
    assert "Python 3" in source.description()
