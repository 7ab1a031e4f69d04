# The program and its demo, and what the checks need to build more from the same dependencies.
{
  lib,
  craneLib,
}:
let
  fs = lib.fileset;
  source =
    files:
    fs.toSource {
      root = ../.;
      fileset = fs.unions files;
    };

  rustFiles = fs.fileFilter (file: file.hasExt "rs");

  # What the program is made of. Nothing else changes its store path.
  program = [
    ../Cargo.lock
    ../Cargo.toml
    ../src
    # named in Cargo.toml, so cargo wants to see them
    (fs.maybeMissing ../benches)
  ];
  sources = {
    program = source program;
    demo = source (program ++ [ (rustFiles ../examples) ]);
    # everything that cargo compiles
    all = source (
      program
      ++ [
        (rustFiles ../examples)
        (rustFiles ../tests)
      ]
    );
    deny = source (program ++ [ ../deny.toml ]);
  };

  common = {
    src = sources.program;
    strictDeps = true;
    # tests listen on loopback
    __darwinAllowLocalNetworking = true;
    env = {
      # The C code of aws-lc-sys is compiled with warnings as errors here and there,
      # and glibc warns about _FORTIFY_SOURCE without optimisation.
      CARGO_PROFILE_DEV_OPT_LEVEL = "1";
      CARGO_PROFILE_DEV_DEBUG = "line-tables-only";
    };
  };

  # Built once: in release for the program, in dev for tests and lints, so that
  # not every test binary goes through link-time optimisation.
  cargoArtifacts = craneLib.buildDepsOnly (
    common
    // {
      cargoCheckCommand = "cargo check";
      cargoTestCommand = "cargo test";
    }
  );

  withArtifacts = common // {
    inherit cargoArtifacts;
  };
  dev = withArtifacts // {
    CARGO_PROFILE = "dev";
  };

  meta = {
    description = "Lets unprivileged users run Codex without holding the OpenAI API key";
    longDescription = ''
      A proxy on loopback that reads an OpenAI API key from its standard input,
      forwards POST /v1/responses with that key added, and refuses everything
      else. It takes the place of OpenAI's own codex-responses-api-proxy, flag
      for flag.
    '';
    homepage = "https://github.com/codex-responses-proxy/codex-responses-proxy";
    changelog = "https://github.com/codex-responses-proxy/codex-responses-proxy/blob/main/CHANGELOG.md";
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "codex-responses-api-proxy";
    maintainers = [ ];
    platforms = lib.platforms.linux ++ lib.platforms.darwin;
  };

  package = craneLib.buildPackage (
    withArtifacts
    // {
      inherit meta;
      # the check `nextest` runs them
      doCheck = false;
      # no trace of where it was built
      disallowedReferences = [ package.cargoVendorDir ];
    }
  );

  demo = craneLib.buildPackage (
    dev
    // {
      src = sources.demo;
      pname = "codex-responses-proxy-demo";
      cargoBuildExtraArgs = "--example demo";
      doCheck = false;
      postInstall = "mv $out/bin/demo $out/bin/codex-responses-proxy-demo";
      meta = meta // {
        description = "Shows codex-responses-proxy at work, with no account and no internet";
        mainProgram = "codex-responses-proxy-demo";
      };
    }
  );
in
{
  inherit
    craneLib
    package
    demo
    sources
    withArtifacts
    dev
    ;
}
