-- OMOP CDM 5.3 and 5.4 to the tables that prepare_data.py works on. Every column comes as text: ids are 64-bit hashes.
-- Facts used: https://ohdsi.github.io/CommonDataModel/cdm54.html; unit ids are those of the standard vocabulary (UCUM).

CREATE TABLE concepts AS
SELECT concept_id, any_value(concept_name ORDER BY concept_name) AS name, any_value(concept_code ORDER BY concept_code)
       AS code, any_value(vocabulary_id ORDER BY vocabulary_id) AS vocabulary
FROM concept GROUP BY concept_id;

-- Units without a concept table, and where UCUM's spelling is not the usual one. 8510, [U], stands for any "units".
CREATE TABLE units AS
SELECT concept_id, code AS unit FROM concepts WHERE vocabulary = 'UCUM' AND concept_id NOT IN ('9557', '8483', '8815', '8510')
UNION
SELECT * FROM (VALUES
    ('8876', 'mm[Hg]'), ('8554', '%'), ('9557', 'meq/L'), ('8753', 'mmol/L'), ('8840', 'mg/dL'), ('8713', 'g/dL'),
    ('8541', '/min'), ('8483', '/min'), ('8848', '10*3/uL'), ('8815', '10*6/uL'), ('9444', '10*9/L'), ('8555', 's'),
    ('8923', '[iU]/L'), ('8645', 'U/L'), ('586323', 'Cel'), ('9289', '[degF]'), ('8749', 'umol/L'), ('8842', 'ng/mL'),
    ('8845', 'pg/mL'), ('8751', 'mg/L'), ('8636', 'g/L'), ('8587', 'mL'), ('9529', 'kg'), ('8582', 'cm'), ('9448', 'a')
) AS known(concept_id, unit) WHERE concept_id NOT IN (SELECT concept_id FROM concepts WHERE vocabulary = 'UCUM')
   OR concept_id IN ('9557', '8483', '8815');

-- `--ids source` takes the hospital's own numbers, where the tables have them and no two patients have the same.
CREATE TABLE people AS
SELECT person_id, CASE WHEN getvariable('ids') = 'source'
                             AND count(DISTINCT person_id) OVER (PARTITION BY person_source_value) = 1
                       THEN coalesce(nullif(person_source_value, ''), person_id) ELSE person_id END AS client,
       try_cast(year_of_birth AS INTEGER) AS birth_year, gender_concept_id, gender_source_value
FROM person QUALIFY row_number() OVER (PARTITION BY person_id ORDER BY year_of_birth) = 1;

CREATE TABLE all_visits AS
SELECT v.visit_occurrence_id,
       CASE WHEN getvariable('ids') = 'source'
             AND count(DISTINCT v.person_id) OVER (PARTITION BY v.visit_source_value) = 1
            THEN coalesce(nullif(v.visit_source_value, ''), v.visit_occurrence_id) ELSE v.visit_occurrence_id END AS visit_id,
       v.person_id, coalesce(p.client, v.person_id) AS client, v.visit_concept_id AS kind,
       coalesce(wall(v.visit_start_datetime), wall(v.visit_start_date)) AS visit_start,
       coalesce(wall_end(v.visit_end_datetime), wall_end(v.visit_end_date)) AS visit_end
FROM visit_occurrence v LEFT JOIN people p USING (person_id);

-- A visit_occurrence_id that stands twice must not double the rows that name it.
CREATE TABLE visit_names AS
SELECT visit_occurrence_id, visit_id FROM all_visits
QUALIFY row_number() OVER (PARTITION BY visit_occurrence_id ORDER BY visit_start, visit_end, visit_id) = 1;

-- A stay is an inpatient visit (9201, 8717, 262: emergency and inpatient, 32037: intensive care, 8920, 8863, 8971), a day
-- under observation (581385), or any visit but an outpatient one (9202, 581477, 5083) that goes over midnight and lasts 16
-- hours or more. It starts with an emergency visit of the same person that ends less than 12 hours before it.
CREATE TABLE hospital_stays AS
SELECT * FROM all_visits
WHERE kind IN ('9201', '8717', '262', '32037', '8920', '8863', '8971', '581385')
   OR kind NOT IN ('9202', '581477', '5083') AND visit_start::DATE < visit_end::DATE
      AND visit_end - visit_start >= INTERVAL 16 HOUR;

CREATE TABLE deaths AS
SELECT person_id, min(coalesce(wall(death_datetime), wall(death_date))) AS died_at, bool_or(wall(death_datetime) IS NOT NULL
       AND wall(death_datetime) <> wall(death_date)) AS exact
FROM death GROUP BY person_id;

CREATE TABLE visits AS
SELECT s.visit_id, s.client, min(coalesce(e.visit_start, s.visit_start)) AS visit_start, s.visit_end,
       CASE WHEN (SELECT count(*) FROM deaths) > 0
            THEN coalesce(bool_or(d.died_at::DATE BETWEEN s.visit_start::DATE AND s.visit_end::DATE), false) END AS died
FROM hospital_stays s
LEFT JOIN all_visits e ON e.person_id = s.person_id AND e.kind IN ('9203', '8870')
      AND e.visit_occurrence_id NOT IN (SELECT visit_occurrence_id FROM hospital_stays)
      AND e.visit_start <= s.visit_start AND e.visit_end + INTERVAL 12 HOUR >= s.visit_start
LEFT JOIN deaths d ON d.person_id = s.person_id
GROUP BY s.visit_id, s.client, s.visit_start, s.visit_end;

-- Parts of visits in intensive care, by the name of the ward or the concept; those that follow one another are one stay.
CREATE TABLE icu_parts AS
SELECT DISTINCT d.visit_detail_id, v.visit_id, v.client, wall(d.visit_detail_start_datetime) AS "start",
       wall(d.visit_detail_end_datetime) AS stop
FROM visit_detail d JOIN visit_names n USING (visit_occurrence_id) JOIN visits v ON v.visit_id = n.visit_id
LEFT JOIN (SELECT care_site_id, any_value(care_site_name ORDER BY care_site_name) AS name FROM care_site GROUP BY ALL) c
       USING (care_site_id)
WHERE (d.visit_detail_concept_id IN ('32037', '581379') AND c.name IS NULL
       OR regexp_matches(lower(c.name), '\b[a-z]*icu\b|intensive care|\bccu\b|coronary care|critical care'))
  AND wall(d.visit_detail_end_datetime) > wall(d.visit_detail_start_datetime);

CREATE TABLE icu_stays AS
SELECT any_value(visit_detail_id ORDER BY "start", visit_detail_id) AS stay_id, visit_id, client,
       min("start") AS stay_start, max(stop) AS stay_end
FROM (
    SELECT *, sum(new_stay) OVER (PARTITION BY visit_id ORDER BY "start", visit_detail_id) AS number
    FROM (
        SELECT *, coalesce("start" > max(stop) OVER (PARTITION BY visit_id ORDER BY "start", visit_detail_id
               ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), true)::INTEGER AS new_stay
        FROM icu_parts
    )
)
GROUP BY visit_id, client, number;

-- The code is the one of the standard concept (LOINC, mostly) where its table is there; else the concept's id. Concept 0
-- means that nothing was mapped: then it is the source's own code, and with `--codes source` always. The only time is the
-- collection's.
CREATE VIEW events AS
SELECT person_id, visit_occurrence_id, measurement_concept_id AS concept_id, measurement_source_value AS source_code,
       coalesce(moment(measurement_datetime), moment(concat(left(measurement_date, 10), ' ', measurement_time))) AS charted,
       value_as_number AS number, value_source_value AS value, unit_concept_id, unit_source_value, range_low, range_high
FROM measurement
UNION ALL BY NAME
SELECT person_id, visit_occurrence_id, observation_concept_id AS concept_id, observation_source_value AS source_code,
       moment(observation_datetime) AS charted, value_as_number AS number,
       coalesce(value_as_string, value_source_value) AS value, unit_concept_id, unit_source_value
FROM observation;

CREATE VIEW source_rows AS
SELECT v.visit_id, coalesce(p.client, e.person_id) AS client, e.charted, e.value, e.number,
       CASE WHEN getvariable('codes') = 'source' OR coalesce(e.concept_id, '0') = '0' THEN e.source_code
            ELSE coalesce(c.code, e.concept_id) END AS code,
       coalesce(u.unit, e.unit_source_value) AS unit,
       try_cast(e.range_low AS DOUBLE) AS low, try_cast(e.range_high AS DOUBLE) AS high
FROM events e
LEFT JOIN people p USING (person_id)
LEFT JOIN visit_names v ON v.visit_occurrence_id = whole(e.visit_occurrence_id)
LEFT JOIN concepts c ON c.concept_id = e.concept_id
LEFT JOIN units u ON u.concept_id = e.unit_concept_id;

CREATE TABLE code_names AS
SELECT code, name FROM concepts WHERE vocabulary <> 'UCUM' AND code IS NOT NULL
UNION
SELECT DISTINCT m.source_code, c.name
FROM (SELECT DISTINCT source_code, concept_id FROM events) m JOIN concepts c USING (concept_id)
WHERE getvariable('codes') = 'source';

CREATE TABLE patients_known AS
SELECT client, birth_year, CASE gender_concept_id WHEN '8507' THEN 'male' WHEN '8532' THEN 'female'
       ELSE gender_source_value END AS sex
FROM people;

-- drug_type_concept_id: 38000180 and 32818 are administrations, the others are orders, dispensings and lists.
CREATE TABLE antibiotics AS
SELECT coalesce(p.client, d.person_id) AS client, v.visit_id, s.stay_id,
       coalesce(wall(d.drug_exposure_start_datetime), wall(d.drug_exposure_start_date)) AS start,
       coalesce(wall(d.drug_exposure_end_datetime), wall(d.drug_exposure_end_date)) AS stop,
       concat_ws(' ', c.name, own.name, d.drug_source_value) AS name,
       coalesce(d.route_source_value, r.name) AS route,
       d.drug_type_concept_id IN ('38000180', '32818') AS administered, d.drug_exposure_id AS order_id
FROM drug_exposure d
LEFT JOIN people p USING (person_id)
LEFT JOIN visit_names v ON v.visit_occurrence_id = whole(d.visit_occurrence_id)
LEFT JOIN icu_stays s ON s.visit_id = v.visit_id AND wall(d.drug_exposure_start_datetime) >= s.stay_start
      AND wall(d.drug_exposure_start_datetime) < s.stay_end
LEFT JOIN concepts c ON c.concept_id = d.drug_concept_id AND d.drug_concept_id <> '0'
LEFT JOIN concepts own ON own.concept_id = d.drug_source_concept_id AND d.drug_source_concept_id <> '0'
LEFT JOIN concepts r ON r.concept_id = d.route_concept_id;

-- Specimens, and measurements that are about a culture. Whether something grew is not told reliably.
CREATE TABLE cultures AS
SELECT coalesce(p.client, s.person_id) AS client, NULL::VARCHAR AS visit_id,
       coalesce(wall(s.specimen_datetime), wall(s.specimen_date)) AS time, s.specimen_datetime IS NOT NULL AS has_time,
       coalesce(c.name, s.specimen_source_value) AS specimen,
       coalesce(regexp_matches(lower(c.name), 'blood') OR s.specimen_concept_id IN ('4001225', '4046280', '4047496'), false)
       AS blood, false AS positive, s.specimen_id AS culture_id
FROM specimen s LEFT JOIN people p USING (person_id) LEFT JOIN concepts c ON c.concept_id = s.specimen_concept_id
UNION ALL BY NAME
SELECT coalesce(p.client, e.person_id) AS client, v.visit_id, e.charted AS time, true AS has_time, c.name AS specimen,
       regexp_matches(lower(c.name), 'blood') AS blood, false AS positive,
       concat(e.person_id, ' ', e.charted, ' ', c.code) AS culture_id
FROM events e JOIN concepts c USING (concept_id) LEFT JOIN people p USING (person_id)
LEFT JOIN visit_names v ON v.visit_occurrence_id = whole(e.visit_occurrence_id)
WHERE regexp_matches(lower(c.name), 'bacteria identified|by culture|microorganism identified')
GROUP BY ALL;

CREATE TABLE vasopressors AS
SELECT client, visit_id, start, stop, pressor(name) AS drug, NULL::DOUBLE AS rate
FROM antibiotics WHERE administered AND pressor(name) IS NOT NULL;

-- Procedures by their name.
CREATE TABLE ventilation AS
SELECT coalesce(p.client, o.person_id) AS client, v.visit_id, wall(o.procedure_datetime) AS start,
       wall(o.procedure_end_datetime) AS stop
FROM procedure_occurrence o
LEFT JOIN people p USING (person_id)
LEFT JOIN visit_names v ON v.visit_occurrence_id = whole(o.visit_occurrence_id)
JOIN concepts c ON c.concept_id = o.procedure_concept_id
WHERE regexp_matches(lower(c.name), 'invasive ventilation|mechanical ventilation') AND o.procedure_end_datetime IS NOT NULL;

CREATE TABLE urine AS
SELECT coalesce(p.client, e.person_id) AS client, v.visit_id, e.charted AS time, try_cast(e.number AS DOUBLE) AS volume
FROM events e JOIN concepts c USING (concept_id) LEFT JOIN people p USING (person_id)
LEFT JOIN visit_names v ON v.visit_occurrence_id = whole(e.visit_occurrence_id)
WHERE e.unit_concept_id = '8587' AND regexp_matches(lower(c.name), 'urine (output|volume)|volume of urine');
