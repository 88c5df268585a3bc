"""The known files: that the catalog agrees with itself and finds what people type."""

import re

from mmdata.hub import catalog


def test_every_entry_is_well_formed() -> None:
    keys = [known.key for known in catalog.FILES]
    assert len(keys) == len(set(keys))
    for known in catalog.FILES:
        assert known.sha256 is None or re.fullmatch(r"[0-9a-f]{16,64}", known.sha256), known.key
        assert all(re.fullmatch(r"[0-9a-f]{7,40}", revision) for revision in known.revisions.values()), known.key
        assert known.num_bytes is None or known.about_bytes is None, known.key
        assert known.path.endswith(".jsonl")
        assert known.fields


def test_presets_name_known_files_and_tokenizers() -> None:
    for preset, keys in catalog.PRESETS.items():
        assert all(catalog.find(key) for key in keys), preset
        assert catalog.PRESET_TOKENIZER[preset] in catalog.TOKENIZERS, preset


def test_keys_names_and_paths_lead_to_the_same_file() -> None:
    for name in ("rlaif_mini", "rlaif_mini.jsonl", "rlaif-mini.jsonl"):
        known = catalog.find(name)
        assert known is not None
        assert known.key == "rlaif_mini"
    assert catalog.find("nothing") is None


def test_the_two_files_named_dpo_are_told_apart() -> None:
    new, old = catalog.find("dpo.jsonl"), catalog.find("dpo_v1")
    assert new is not None
    assert old is not None
    assert new.path == old.path
    assert new.name != old.name
    assert catalog.is_namesake(old, new.num_bytes, new.sha256)
    assert catalog.is_namesake(new, 909_000_000, None)
    assert not catalog.is_namesake(new, new.num_bytes, new.sha256)
    assert not catalog.is_namesake(new, 60_000_000, "0" * 64)  # a third one would be news, not a namesake


def test_exact_figures_decide_and_rough_ones_have_slack() -> None:
    medical, mini, rough = (catalog.find(name) for name in ("lora_medical", "sft_mini_512", "sft_1024"))
    assert medical is not None
    assert mini is not None
    assert rough is not None
    assert catalog.fits(mini, None, "475039fa9b80ad36" + "0" * 48)
    assert not catalog.fits(mini, mini.num_bytes, "0" * 64)
    assert not catalog.fits(mini, 5, None)
    assert catalog.fits(rough, 5_700_000_000, None)
    assert not catalog.fits(rough, 9_000_000_000, None)


def test_globs_and_misspellings_find_their_neighbours() -> None:
    assert [known.key for known in catalog.find_glob("agent_*")] == ["agent_rl", "agent_rl_math"]
    assert "pretrain_hq" in catalog.nearest("pretrain_hqq.jsonl")
    assert "extra" in catalog.nearest("extro", ("extra",))
