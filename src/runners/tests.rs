//! Tests of the registry with scripted runners.
