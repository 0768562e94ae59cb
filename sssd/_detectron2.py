"""Imported first by every part that needs Detectron2: says in a sentence when it is missing."""

import sssd_compat

sssd_compat.require_detectron2()
