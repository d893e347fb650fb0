"""What ``mmbase doctor`` says of the kernels."""

from mmbase.doctor import examine


def test_the_choice_of_kernels_is_a_finding(monkeypatch):
    monkeypatch.delenv("MMBASE_KERNELS", raising=False)
    first, *_ = (finding for finding in examine() if finding.subject == "kernels")
    assert first.good and first.text.startswith("attention: ")
    monkeypatch.setenv("MMBASE_KERNELS", "tritn")
    (only,) = (finding for finding in examine() if finding.subject == "kernels")
    assert not only.good and "did you mean 'triton'" in only.text
