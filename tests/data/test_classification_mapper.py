import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from sssd.data import ImageError
from sssd.data.classification_mapper import AUGMENTATIONS, ClassificationMapper

# Every pixel has a value of its own, and none that of the border.
GREY = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)


def record(image, **changes):
    return {"image": image, "label": 3, "image_id": 17, **changes}


def windows(image):
    """The nine 8x8 windows of an 8x8 image with a black border of one pixel, as bytes."""
    padded = np.pad(image[..., 0], 1)
    return [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]


def outcomes(mapper, image, count=300):
    torch.manual_seed(0)
    return {mapper(record(image))["image"].numpy().tobytes() for _ in range(count)}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[:3])
def test_evaluation_keeps_images_of_the_size(augmentation):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for image in (GREY, rgb):
        sample = ClassificationMapper(False, 8, augmentation)(record(image))
        assert set(sample) == {"image", "label", "image_id"}
        assert (sample["label"], sample["image_id"]) == (3, 17)
        assert sample["image"].dtype == torch.uint8 and sample["image"].is_contiguous()
        np.testing.assert_array_equal(sample["image"].numpy(), image.transpose(2, 0, 1))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_evaluation_draws_nothing(augmentation):
    state = torch.get_rng_state()
    ClassificationMapper(False, 8, augmentation)(record(GREY))
    assert torch.equal(state, torch.get_rng_state())


def test_the_sample_has_its_own_memory():
    image = GREY.copy()
    ClassificationMapper(True, 8, "none")(record(image))["image"].zero_()
    np.testing.assert_array_equal(image, GREY)


def test_crop_gives_every_window_and_no_other():
    expected = {window.tobytes() for window in windows(GREY)}
    assert len(expected) == 9
    assert outcomes(ClassificationMapper(True, 8, "crop"), GREY) == expected


def test_crop_flip_also_mirrors_them_left_to_right():
    expected = {w.tobytes() for w in windows(GREY)} | {w[:, ::-1].tobytes() for w in windows(GREY)}
    assert len(expected) == 18
    assert outcomes(ClassificationMapper(True, 8, "crop_flip"), GREY) == expected


def test_the_border_is_an_eighth():
    """CIFAR's: four pixels on each side of 32."""
    mapper = ClassificationMapper(True, 32, "crop")
    image = np.full((32, 32, 3), 9, dtype=np.uint8)
    torch.manual_seed(0)
    black = [(mapper(record(image))["image"][0] == 0) for _ in range(300)]
    assert {int(mask.all(dim=1).sum()) for mask in black} == {0, 1, 2, 3, 4}
    assert {int(mask.all(dim=0).sum()) for mask in black} == {0, 1, 2, 3, 4}


def test_resized_crop_is_that_of_the_first_torchvision_transforms():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    peer = transforms.Compose(
        [
            transforms.RandomResizedCrop(16, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), antialias=True),
            transforms.RandomHorizontalFlip(0.5),
        ]
    )
    mapper = ClassificationMapper(True, 16, "resized_crop")
    torch.manual_seed(3)
    ours = [mapper(record(image))["image"] for _ in range(20)]
    torch.manual_seed(3)
    theirs = [peer(torch.from_numpy(image.transpose(2, 0, 1).copy())) for _ in range(20)]
    # The first ones resize in float32, so roundings differ.
    assert (torch.stack(ours).int() - torch.stack(theirs).int()).abs().max() <= 1
    assert not torch.equal(ours[0], ours[1])


def test_resized_crop_evaluates_the_centre():
    image = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    sample = ClassificationMapper(False, 224, "resized_crop")(record(image))
    expected = image[16:240, 38:262].transpose(2, 0, 1)  # the shorter side is 256 already
    np.testing.assert_array_equal(sample["image"].numpy(), expected)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("is_train", [True, False])
def test_images_of_other_sizes_get_the_size(augmentation, is_train):
    mapper = ClassificationMapper(is_train, 16, augmentation)
    for height, width, channels in ((8, 8, 1), (40, 17, 3), (9, 64, 3)):
        image = np.full((height, width, channels), 77, dtype=np.uint8)
        assert mapper(record(image))["image"].shape == (channels, 16, 16)


def test_a_seed_fixes_what_is_drawn():
    mapper = ClassificationMapper(True, 8, "crop_flip")

    def draw(seed):
        torch.manual_seed(seed)
        return torch.stack([mapper(record(GREY))["image"] for _ in range(20)])

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_files_are_read_as_rgb(tmp_path):
    colour, grey = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    Image.new("RGB", (8, 8), (10, 20, 30)).save(colour)
    Image.new("L", (8, 8), 40).save(grey)
    mapper = ClassificationMapper(False, 8, "none")
    for path, values in ((colour, [10, 20, 30]), (grey, [40, 40, 40])):
        sample = mapper({"file_name": path, "label": 1, "image_id": 2})
        assert sample["image"][:, 3, 5].tolist() == values and "file_name" not in sample


def test_bad_images(tmp_path):
    mapper = ClassificationMapper(False, 8, "none")
    path = tmp_path / "a.png"
    for content, message in ((None, "does not exist"), (b"\x89PNG nonsense", "cannot be read")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            mapper({"file_name": str(path), "label": 1, "image_id": 2})
        assert f"The image {path} {message}" in str(caught.value)
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(path)
    with pytest.raises(ImageError, match="a.png has more than 8 bits a channel .* convert it"):
        mapper({"file_name": str(path), "label": 1, "image_id": 2})
    with pytest.raises(ImageError, match="image_id 17 has an image of float64 and the shape"):
        mapper(record(GREY / 255))


def test_bad_settings():
    with pytest.raises(ValueError, match="'cutout'; choose one of none, crop, crop_flip, resized"):
        ClassificationMapper(True, 8, "cutout")
    with pytest.raises(ValueError, match="'crop' cannot be used with images of 7 pixels: set the"):
        ClassificationMapper(True, 7, "crop")
    with pytest.raises(ValueError, match="'none' cannot be used with images of 0 pixels"):
        ClassificationMapper(True, 0, "none")
