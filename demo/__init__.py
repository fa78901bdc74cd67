"""The whole job on data that needs no download: scikit-learn's bundled digits."""
