"""How a program of launch/ answers a user's mistake."""

import re


def assert_one_sentence(result, *words):
    assert result["status"] == 2, result
    assert "Traceback" not in result["stdout"] + result["stderr"]
    assert result["stderr"].startswith("error: ") and result["stderr"].count("\n") == 1, result["stderr"]
    assert len(re.sub(r"/[\w./-]*/", "", result["stderr"])) < 300, result["stderr"]  # the folders of tests are long
    for word in words:
        assert word in result["stderr"], result["stderr"]
