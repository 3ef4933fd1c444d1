"""DIA: contrastive one-class learning in which dissolved images are extra negatives."""
