"""Detectron2's FCOS for yacs configs.

Detectron2 has the detector (arXiv 1904.01355 and 2006.09214) but no way to it from yacs. This
registers one, under a name of its own and with its keys under MODEL.SSSD.FCOS, because other
packages own "FCOS" and MODEL.FCOS.
"""

from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from omegaconf import DictConfig

__all__ = ["Detectron2FCOS", "lazy_fcos"]


@META_ARCH_REGISTRY.register()
def Detectron2FCOS(cfg: CfgNode) -> FCOS:
    """Builds Detectron2's own class from MODEL.SSSD.FCOS, MODEL.BACKBONE and MODEL.FPN."""
    return instantiate(lazy_fcos(cfg))


def lazy_fcos(cfg: CfgNode) -> DictConfig:
    """The same detector as a LazyConfig node, which needs nothing but Detectron2.

    The bottom-up network stays what the yacs config says, so the node holds that config as text.

    Raises:
        ValueError: when the top block of another backbone than Detectron2's is to be replaced, or
            its source is not the coarsest map.
    """
    keys = cfg.MODEL.SSSD.FCOS
    stock = cfg.clone()
    stock.defrost()
    del stock.MODEL["SSSD"]
    yacs = LazyCall("detectron2.config.CfgNode.load_cfg")(cfg_file_obj_or_str=stock.dump())
    if keys.TOP_BLOCK_IN_FEATURE:
        backbone = _lazy_resnet_fpn(cfg, yacs)
    else:
        backbone = LazyCall(build_backbone)(cfg=yacs)
    return LazyCall(FCOS)(
        backbone=backbone,
        head=LazyCall(FCOSHead)(
            input_shape=[LazyCall(ShapeSpec)(channels=cfg.MODEL.FPN.OUT_CHANNELS)]
            * len(keys.IN_FEATURES),
            num_classes=keys.NUM_CLASSES,
            conv_dims=[cfg.MODEL.FPN.OUT_CHANNELS] * keys.NUM_CONVS,
            prior_prob=keys.PRIOR_PROB,
            norm=keys.NORM,
        ),
        head_in_features=list(keys.IN_FEATURES),
        num_classes=keys.NUM_CLASSES,
        center_sampling_radius=keys.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=keys.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=keys.FOCAL_LOSS_GAMMA,
        test_score_thresh=keys.SCORE_THRESH_TEST,
        test_topk_candidates=keys.TOPK_CANDIDATES_TEST,
        test_nms_thresh=keys.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
    )


# For the export: what stock yacs cannot build is written as a LazyConfig.
Detectron2FCOS.lazy_config = lazy_fcos


def _lazy_resnet_fpn(cfg: CfgNode, yacs: DictConfig) -> DictConfig:
    """An FPN whose two coarsest levels come from another map than the backbone builder's."""
    name, builder = cfg.MODEL.BACKBONE.NAME, "build_retinanet_resnet_fpn_backbone"
    if name != builder:
        raise ValueError(
            f"MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE works with MODEL.BACKBONE.NAME {builder!r}, and "
            f"it is {name!r}; set the key to '' to take the backbone as it is."
        )
    channels, source = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE
    # P6 has half the resolution of the map that it is made of: the coarsest one, before or after
    # its way through the pyramid.
    coarsest = cfg.MODEL.FPN.IN_FEATURES[-1]
    pyramid_level = coarsest.replace("res", "p")
    if source not in (pyramid_level, coarsest):
        raise ValueError(
            f"MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE is {source!r}: it has to be {pyramid_level!r} "
            f"or {coarsest!r}, the coarsest map of MODEL.FPN.IN_FEATURES, or '' to take the "
            "backbone as it is."
        )
    if source == pyramid_level:
        in_channels = channels
    else:
        in_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** (int(coarsest[-1]) - 2)
    return LazyCall(FPN)(
        bottom_up=LazyCall(build_resnet_backbone)(
            cfg=yacs, input_shape=LazyCall(ShapeSpec)(channels=len(cfg.MODEL.PIXEL_MEAN))
        ),
        in_features=list(cfg.MODEL.FPN.IN_FEATURES),
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LazyCall(LastLevelP6P7)(
            in_channels=in_channels, out_channels=channels, in_feature=source
        ),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
