"""The plot of a run's log."""
from PIL import Image

import plot

HEADER = "epoch,loss,label_loss,patch_loss,hecl,val_auc\n"


def test_it_draws_three_panels(tmp_path):
    for name, auc in (("a", 0.6), ("b", 0.9)):
        (tmp_path / name).write_text(f"{HEADER}1,2,0.7,0.4,7,{auc}\n2,2,0.5,0.3,7,0.95\n")
    out = tmp_path / "plot.png"
    assert plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    colours = {colour for _, colour in Image.open(out).getcolors(maxcolors=1 << 20)}
    for name in plot.COLOURS[:2]:                            # one line a run
        assert Image.new("RGB", (1, 1), name).getpixel((0, 0)) in colours


def test_a_file_that_is_no_log_is_one_line(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for file in (tmp_path / "other.csv", tmp_path / "missing.csv"):
        assert plot.main([str(file), "--out", str(tmp_path / "plot.png")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
