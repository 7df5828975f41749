"""The colours of labels, the same in every picture and file."""

# Okabe and Ito, told apart by colour-blind eyes: https://jfly.uni-koeln.de/color/
LABEL_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
