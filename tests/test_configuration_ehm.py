"""What a configuration accepts, what it derives, and what its refusals say."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ViTMAEConfig

from modeling_ehm import EHMConfig
from modeling_ehm.configuration_ehm import to_pair

# On purpose: the eps of MAE's published code, and the better target of MAE's Table 1.
DIFFERS_FROM_VIT_MAE = {"layer_norm_eps": (1e-6, 1e-12), "norm_pix_loss": (True, False)}


def test_defaults_equal_vit_mae_where_shared():
    ours, mae = EHMConfig(), ViTMAEConfig()
    shared = [name for name in ViTMAEConfig.__annotations__ if name != "model_type"]
    assert len(shared) == 19
    for name in shared:
        expected = DIFFERS_FROM_VIT_MAE.get(name, (getattr(mae, name),) * 2)
        assert (getattr(ours, name), getattr(mae, name)) == expected, name


def test_sizes_of_vit_base():
    config = EHMConfig()
    assert (config.grid_size, config.num_patches, config.patch_dim) == ((14, 14), 196, 768)
    assert config.num_hidden_patches(196) == 147  # 0.75 * 196
    assert config.num_nodes_range(196) == (196, 24)  # every patch -> an eighth of them


def test_pairs_are_height_and_width(make_config):
    config = make_config(image_size=[64, 96], patch_size=[16, 8], num_channels=5)
    assert (config.grid_size, config.num_patches, config.patch_dim) == ((4, 12), 48, 16 * 8 * 5)
    assert to_pair(7) == to_pair([7, 7]) == to_pair((7, 7)) == (7, 7)


def test_json_round_trip(make_config, tmp_path):
    changes = {
        "image_size": (64, 96),
        "patch_size": [16, 8],
        "teacher": "ema",
        "teacher_decay": 0,
        "affinity": "keys",
        "affinity_layers": [0, -1],
        "linkage": "single",
        "num_nodes_start": 30,
        "num_nodes_end": 4,
        "num_nodes_curve": "log",
        "evolution_start": 0.25,
        "softness_end": 0.5,
        "objective": "simmim",
        "mask_policy": "random",
    }
    config = make_config(**changes)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is EHMConfig
    assert loaded.grid_size == (4, 12)
    assert loaded.to_diff_dict().keys() >= changes.keys()
    for name, value in changes.items():
        assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value), name


@pytest.mark.parametrize(("layers", "resolved"), [("all", (0, 1, 2)), (None, (1,))])
def test_layers_by_name_come_back(make_config, tmp_path, layers, resolved):
    make_config(affinity_layers=layers).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.affinity_layers == layers and loaded.resolved_affinity_layers == resolved


def test_hidden_count_is_rounded_to_the_nearest_patch():
    counts = {0.9: 90, 0.75: 75, 0.6: 60, 0.004: 0, 0.006: 1, 0.996: 100}  # int(100 * (1 - 0.9)) would keep 9 of 100
    assert {ratio: EHMConfig(mask_ratio=ratio).num_hidden_patches(100) for ratio in counts} == counts


def test_node_range_on_other_grids(make_config):
    assert make_config().num_nodes_range(16) == (16, 2)
    assert make_config().num_nodes_range(4) == (4, 2)  # an eighth of 4 is less than 2
    assert make_config().num_nodes_range(1) == (1, 1)
    config = make_config(num_nodes_start=12, num_nodes_end=5)
    assert config.num_nodes_range(16) == (12, 5)
    assert config.num_nodes_range(64) == (12, 5)
    assert config.num_nodes_range(8) == (8, 5)
    assert config.num_nodes_range(4) == (4, 4)


@pytest.mark.parametrize(
    ("affinity", "layers", "resolved"),
    [
        ("attention", None, (1,)),
        ("keys", None, (2,)),
        ("attention", "all", (0, 1, 2)),
        ("keys", "all", (0, 1, 2)),
        ("attention", [-1, 0, 2], (0, 2)),  # -1 and 2 are one layer of 3
        ("keys", [1], (1,)),
        ("attention", [-3, -2], (0, 1)),
    ],
)
def test_affinity_layers(make_config, affinity, layers, resolved):
    assert make_config(affinity=affinity, affinity_layers=layers).resolved_affinity_layers == resolved


def test_the_only_layer_is_read_where_there_is_no_second(make_config):
    assert make_config(num_hidden_layers=1).resolved_affinity_layers == (0,)


def test_parts_of_the_forerunner_are_of_all_layers(make_config):
    assert make_config(mask_policy="epm").resolved_affinity_layers == (0, 1, 2)
    assert make_config(mask_policy="epm", affinity_layers=[1]).resolved_affinity_layers == (1,)
    assert make_config(mask_policy="epm", affinity="keys").resolved_affinity_layers == (2,)


# changes -> what the message must name: field, received value, rule.
REFUSED = [
    ({"image_size": 33}, "image_size=33 is not a multiple of patch_size=8 in height; 32 or 40 would be"),
    ({"image_size": [32, 36]}, r"image_size=\[32, 36\] is not a multiple of patch_size=8 in width; 32 or 40 would be"),
    ({"image_size": 4}, "image_size=4 is not a multiple of patch_size=8 in height; 8 "),
    ({"image_size": 0}, "image_size=0 must be a positive number of pixels or a pair"),
    ({"image_size": -32}, "image_size=-32 must be a positive number"),
    ({"image_size": [32]}, r"image_size=\[32\] must be a positive number of pixels or a pair"),
    ({"image_size": [32, 32, 32]}, r"image_size=\[32, 32, 32\] must be a positive"),
    ({"image_size": []}, r"image_size=\[\] must be a positive number of pixels or a pair"),
    ({"patch_size": 0}, "patch_size=0 must be a positive"),
    ({"patch_size": [8, 0]}, r"patch_size=\[8, 0\] must be a positive"),
    ({"num_channels": 0}, "num_channels=0 must be at least 1"),
    ({"hidden_size": 66, "num_attention_heads": 2}, "hidden_size=66 must be a positive multiple of 4"),
    ({"hidden_size": 0}, "hidden_size=0 must be a positive multiple of 4"),
    ({"num_attention_heads": 3}, "hidden_size=64 is not a multiple of num_attention_heads=3"),
    ({"num_attention_heads": 0}, "hidden_size=64 is not a multiple of num_attention_heads=0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"decoder_hidden_size": 30, "decoder_num_attention_heads": 2}, "decoder_hidden_size=30 must be a positive"),
    ({"decoder_num_attention_heads": 5}, "decoder_hidden_size=32 is not a multiple of decoder_num_attention_heads=5"),
    ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers=0 must be at least 1"),
    ({"teacher_dtype": "float16"}, "teacher_dtype='float16' is not one of None, bfloat16"),
    ({"masks_per_image": 0}, "masks_per_image=0 must be at least 1"),
    ({"mask_ratio": 0.0}, "mask_ratio=0.0 must lie strictly between 0 and 1"),
    ({"mask_ratio": 1.0}, "mask_ratio=1.0 must lie strictly between 0 and 1"),
    ({"mask_ratio": -0.5}, "mask_ratio=-0.5 must lie strictly"),
    ({"mask_ratio": float("nan")}, "mask_ratio=nan must lie strictly"),
    ({"mask_ratio": 0.03}, "mask_ratio=0.03 hides 0 of 16 patches; at least one patch must be hidden"),
    ({"mask_ratio": 0.97}, "mask_ratio=0.97 hides 16 of 16 patches; at least one patch must be hidden and one visible"),
    ({"image_size": 8}, "mask_ratio=0.75 hides 1 of 1 patches"),
    ({"objective": "beit"}, "objective='beit' is not one of mae, simmim"),
    ({"teacher": "none"}, "teacher='none' is not one of online, ema"),
    ({"affinity": "values"}, "affinity='values' is not one of attention, keys"),
    ({"linkage": "ward"}, "linkage='ward' is not one of average, single, complete"),
    ({"num_nodes_curve": "sqrt"}, "num_nodes_curve='sqrt' is not one of linear, log, cosine"),
    ({"teacher_decay": 1.0}, r"teacher_decay=1.0 must lie in \[0, 1\)"),
    ({"teacher_decay": -0.1}, r"teacher_decay=-0.1 must lie in \[0, 1\)"),
    ({"teacher_warmup_steps": -1}, "teacher_warmup_steps=-1 must be 0 .* or more"),
    ({"affinity_layers": []}, r"affinity_layers=\[\] must be a list of layers, as \[1\], each in \[-3, 2\]"),
    ({"affinity_layers": [0, 3]}, r"affinity_layers=\[0, 3\] must be a list of layers, as \[1\], each in \[-3, 2\]"),
    ({"affinity_layers": [-4]}, r"affinity_layers=\[-4\] must be"),
    ({"affinity_layers": "1"}, r"affinity_layers='1' must be a list of layers, as \[1\], .*, or \"all\""),
    ({"num_nodes_start": 17}, r"num_nodes_start=17 must lie in \[1, 16\], the number of patches"),
    ({"num_nodes_end": 0}, r"num_nodes_end=0 must lie in \[1, 16\]"),
    ({"num_nodes_start": 4, "num_nodes_end": 5}, "num_nodes_end=5 exceeds num_nodes_start=4"),
    ({"evolution_start": 1.0}, r"evolution_start=1.0 must lie in \[0, 1\)"),
    ({"evolution_start": -0.1}, r"evolution_start=-0.1 must lie in"),
    ({"evolution_start": float("nan")}, r"evolution_start=nan must lie in"),
    ({"softness_start": 1.5}, r"softness_start=1.5 must lie in \[0, 1\]"),
    ({"softness_end": -0.1}, r"softness_end=-0.1 must lie in \[0, 1\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[",".join(map(str, c.items())) for c, _ in REFUSED])
def test_refusals_name_field_value_and_rule(make_config, changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"mask_ratio": "0.75"}, "mask_ratio"),
        ({"norm_pix_loss": "no"}, "norm_pix_loss"),
        ({"affinity_layers": 2}, "affinity_layers"),
        ({"image_size": 32.0}, "image_size"),
    ],
)
def test_wrong_types_name_the_field(make_config, changes, field):
    with pytest.raises(StrictDataclassError, match=field):
        make_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_ratio": 1 / 16},  # hides exactly one
        {"mask_ratio": 15 / 16},  # leaves exactly one
        {"teacher_decay": 0, "teacher_warmup_steps": 0},
        {"num_nodes_start": 16, "num_nodes_end": 1},
        {"num_nodes_start": 1, "num_nodes_end": 1},
        {"softness_start": 1, "softness_end": 0},
        {"affinity_layers": [-3, 2]},
        {"image_size": [8, 16], "mask_ratio": 0.5},  # two patches: the smallest image there can be
    ],
)
def test_extremes_are_accepted(make_config, changes):
    config = make_config(**changes)
    assert 0 < config.num_hidden_patches(config.num_patches) < config.num_patches


# Overrides of a saved config


@pytest.fixture
def saved(tmp_path):
    EHMConfig(num_hidden_layers=3, affinity_layers=[-1]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "override, problem",
    [
        ({"mask_ratio": 7.0}, "mask_ratio=7.0 must lie strictly between 0 and 1"),
        ({"pooling": "avg"}, "pooling='avg' is not one of mean, cls"),
        ({"image_size": 39}, "image_size=39 is not a multiple of patch_size=16"),
        ({"hidden_size": "768"}, "hidden_size"),
        ({"reshape_hidden_states": False, "feature_scales": [2]}, "feature_scales=.* needs maps"),
    ],
)
@pytest.mark.parametrize("load", [EHMConfig.from_pretrained, AutoConfig.from_pretrained])
def test_overrides_are_checked_as_the_rest(saved, load, override, problem):
    with pytest.raises(StrictDataclassError, match=problem):
        load(saved, **override)


def test_what_follows_from_a_field_follows_its_override(saved):
    config, unused = EHMConfig.from_pretrained(saved, num_hidden_layers=2, color="red", return_unused_kwargs=True)
    assert config.stage_names == ["stem", "stage1", "stage2"] and config.out_features == ["stage2"]
    assert config.resolved_affinity_layers == (1,) and unused == {"color": "red"}
    config = EHMConfig.from_pretrained(saved, out_indices=[1, 3], num_labels=7)
    assert config.out_features == ["stage1", "stage3"] and config.num_labels == 7
    config.save_pretrained(saved)
    assert EHMConfig.from_pretrained(saved, out_features=["stage2"]).out_indices == [2]
    assert EHMConfig.from_pretrained(saved, mask_ratio=0.5).out_indices == [1, 3]
    with pytest.raises(ValueError, match="stage3"):  # chosen, so not moved in silence
        EHMConfig.from_pretrained(saved, num_hidden_layers=2)


def test_saved_numbers_of_nodes_shrink_with_the_image(tmp_path):
    """Those that are given with the size are checked as given."""
    EHMConfig(image_size=64, patch_size=8, num_nodes_start=40, num_nodes_end=20).save_pretrained(tmp_path)
    smaller = EHMConfig.from_pretrained(tmp_path, image_size=32)
    assert (smaller.num_nodes_start, smaller.num_nodes_end) == (16, 16)
    with pytest.raises(StrictDataclassError, match=r"num_nodes_start=40 must lie in \[1, 16\]"):
        EHMConfig.from_pretrained(tmp_path, image_size=32, num_nodes_start=40)
    with pytest.raises(StrictDataclassError, match="image_size"):
        EHMConfig.from_pretrained(tmp_path, image_size="32")
    assert EHMConfig.from_pretrained(tmp_path, image_size=128).num_nodes_start == 40


def test_one_number_a_patch_cannot_be_normalised():
    with pytest.raises(StrictDataclassError, match="patch_size=1 with num_channels=1 leaves one number a patch"):
        EHMConfig(image_size=8, patch_size=1, num_channels=1)
    EHMConfig(image_size=8, patch_size=1, num_channels=1, norm_pix_loss=False)
